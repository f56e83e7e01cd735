"""Which query sees which key: lengths, causality, window and masks, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Who may attend what.

    positions: int64 [B, Lq] (CPU), where each query stands among its sequence's keys; a negative
    position sees nothing under `causal`. lengths: int64 [B] (CPU), keys of each sequence.
    window: a query sees `window` keys, itself included. mask: bool or additive [1 or B, 1 or Hq,
    1 or Lq, 1 or Lk], or None.
    """

    positions: Tensor
    lengths: Tensor
    causal: bool
    window: int | None
    mask: Tensor | None
    heads: int

    def rows(self, first_key: int, last_key: int, align: int) -> slice:
        """The query rows that may see any of the keys `first_key` to `last_key` (exclusive),
        widened to start at a multiple of `align`."""
        count = self.positions.shape[1]
        useful = torch.ones(count, dtype=torch.bool)
        if self.causal:
            useful &= (self.positions >= first_key).any(0)
        if self.window is not None:
            useful &= (self.positions - self.window < last_key - 1).any(0)
        hits = useful.nonzero()
        if not len(hits):
            return slice(0, 0)
        return slice(int(hits[0]) // align * align, int(hits[-1]) + 1)

    def apply(self, scores: Tensor, first_key: int, rows: slice, group: int, own: bool | None = None) -> Tensor:
        """Scores [B, Hkv, n, group, r, size] of n blocks from `first_key` on, for the rows of a
        slice, with -inf where a query does not see a key. `own` keeps only the queries that stand
        in the key's block or before it (True), or behind it (False)."""
        blocks, size = scores.shape[2], scores.shape[-1]
        keys = first_key + torch.arange(blocks * size)
        positions = self.positions[:, rows]
        seen = (keys < self.lengths[:, None])[:, None].expand(-1, positions.shape[1], -1)
        if self.causal:
            seen = seen & (keys <= positions[..., None])
        if self.window is not None:
            seen = seen & (keys > positions[..., None] - self.window)
            if not self.causal:
                seen = seen & (keys < positions[..., None] + self.window)
        if own is not None:
            block, home = keys // size, positions[..., None] // size
            seen = seen & ((block >= home) if own else (block < home))
        if self.mask is not None:
            scores = self._apply_mask(scores, keys, rows, group)
        if bool(seen.all()):
            return scores
        seen = seen.to(scores.device).unflatten(-1, (blocks, size)).transpose(1, 2)  # [B, n, r, size]
        return scores.masked_fill(~seen[:, None, :, None], -torch.inf)

    def _apply_mask(self, scores: Tensor, keys: Tensor, rows: slice, group: int) -> Tensor:
        mask = self.mask
        assert mask is not None
        mask = mask.to(scores.device)
        if mask.shape[2] > 1:
            mask = mask[:, :, rows]
        if mask.shape[3] > 1:
            # Keys past the mask are past every length too: what stands there does not matter.
            mask = mask[..., keys.clamp(max=mask.shape[3] - 1).to(mask.device)].unflatten(-1, scores.shape[2::3])
        else:
            mask = mask[..., None]
        mask = mask.movedim(3, 2)  # [b, h, n, r, size]
        mask = mask.unflatten(1, (-1, group)).movedim(2, 3) if mask.shape[1] > 1 else mask[:, :, :, None]
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
