"""Visibility of keys: lengths, causal mask, window and attn_mask, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees.

    positions: int64 [B, Lq] (CPU), key position of each query; if `causal`, a negative one sees nothing.
    lengths: int64 [B] (CPU), keys of each sequence.
    window: a query at p sees keys from p - window + 1 on and, unless `causal`, up to p + window - 1.
    mask: bool or additive [1 or B, 1 or Hq, 1 or Lq, 1 or Lk], or None.
    valid: bool [B, Lq] (CPU), queries that are not padding, which sees nothing; None for all.

    One sequence with 5 keys and queries at positions 2 to 4, causal, window 3 (x: visible):

        key       0 1 2 3 4
        query 2   x x x
        query 3     x x x
        query 4       x x x
    """

    positions: Tensor
    lengths: Tensor
    causal: bool
    window: int | None
    mask: Tensor | None
    heads: int
    valid: Tensor | None = None

    def rows(self, first_key: int, last_key: int, align: int) -> slice:
        """A range of query rows that contains all that see a key from `first_key` to `last_key` (exclusive).

        It starts at a multiple of `align`.
        """
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
        """Mask scores [B, Hkv, n, group, r, size] of n blocks from `first_key` on, for the query rows `rows`.

        Returns the scores plus an additive mask, with -inf where a query does not see a key. `own` restricts this to
        queries in the key's block or an earlier one (True), or in a later one (False).
        """
        blocks, size = scores.shape[2], scores.shape[-1]
        keys = first_key + torch.arange(blocks * size)
        positions = self.positions[:, rows]
        seen = (keys < self.lengths[:, None])[:, None].expand(-1, positions.shape[1], -1)
        if self.valid is not None:
            seen = seen & self.valid[:, rows, None]
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
            # Keys past the end of the mask are past all lengths too, so any value will do.
            mask = mask[..., keys.clamp(max=mask.shape[3] - 1).to(mask.device)].unflatten(-1, scores.shape[2::3])
        else:
            mask = mask[..., None]
        mask = mask.movedim(3, 2)  # [b, h, n, r, size]
        mask = mask.unflatten(1, (-1, group)).movedim(2, 3) if mask.shape[1] > 1 else mask[:, :, :, None]
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
