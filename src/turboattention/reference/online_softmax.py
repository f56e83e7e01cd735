"""Online softmax over quantized blocks: weights, their INT8 form, and the running result.

Shapes: B batch, H KV heads, n blocks at a time, g query heads per KV head, r query rows, T tokens per block, D head_dim
of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TurboConfig
from ..flashq.symmetric import CODE_MAX
from ..softmax import exponential

STATIC_LEVELS = 127
ROW_LEVELS = 127 * 256
ROW_LARGEST = 126.96875
"""The code of a row's largest product, which rounds to 127. With 127 itself, scales that are half the largest, which
are common, would be rounding ties."""


Exponential = Callable[[Tensor], Tensor]


@dataclass
class Accumulator:
    """Running maximum and normalizer [B, H, g, Lq], and unnormalized output [B, H, g, Lq, D]."""

    row_max: Tensor
    row_sum: Tensor
    out: Tensor

    @classmethod
    def empty(cls, codes: Tensor, v_head_dim: int | None = None) -> Accumulator:
        """The initial state for queries like `codes` [B, H, g, Lq, D]; values have the same D unless given."""
        rows, channels = codes.shape[:-1], v_head_dim or codes.shape[-1]
        return cls(codes.new_full(rows, -torch.inf), codes.new_zeros(rows), codes.new_zeros(*rows, channels))

    def of(self, rows: slice) -> Accumulator:
        """The state of some query rows, a view of the same memory."""
        return Accumulator(self.row_max[:, :, :, rows], self.row_sum[:, :, :, rows], self.out[:, :, :, rows])

    def finish(self) -> tuple[Tensor, Tensor]:
        """out [B, Hq, Lq, D] and lse [B, Hq, Lq] (natural log); 0 and -inf where nothing was seen."""
        seen = self.row_sum > 0
        out = self.out / torch.where(seen, self.row_sum, 1.0)[..., None]
        lse = torch.where(seen, self.row_max + self.row_sum.clamp(min=1e-45).log(), -torch.inf)
        return torch.where(seen[..., None], out, 0.0).flatten(1, 2), lse.flatten(1, 2)


def online_softmax_update(
    config: TurboConfig, softmax: str, state: Accumulator, rows: slice, scores: Tensor, v8: Tensor, v_scale: Tensor
) -> None:
    """Fold n blocks into `state`.

    Args:
        softmax: of `TurboConfig.softmax_on`.
        scores: logits [B, H, n, g, r, T], -inf where unseen, for the query rows of the slice.
        v8: INT8 values held in float [B, H, n, T, D]; v_scale: [B, H, n, T].
    """
    part = state.of(rows)
    block_max = scores.amax(-1)
    if config.row_max == "running":
        # The weights of a block are relative to the maximum after it.
        reference = torch.maximum(block_max.cummax(2).values, part.row_max[:, :, None])
    else:
        reference = block_max
    weigh = exponential(softmax, config.sas_threshold)
    weights = weigh(scores - _finite(reference)[..., None])
    v_scale = v_scale[:, :, :, None, None].expand_as(weights)
    if config.stored_prefill:
        # Relative to the keys that each row sees: later keys may be absent in another call.
        v_scale = torch.where(scores > -torch.inf, v_scale, 0.0)
    row_sum, out = _weighted_values(config, weights, v8, v_scale)
    if config.row_max == "running":
        rescale = torch.exp if config.rescale == "exact" else weigh
        _fold_in_turn(rescale, part, reference, row_sum, out, block_max > -torch.inf)
    else:
        fold_blocks(torch.exp if config.rescale == "exact" else weigh, part, reference, row_sum, out)


def _weighted_values(config: TurboConfig, weights: Tensor, v8: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Per block: sum of the weights [B, H, n, g, r], and weights times values [B, H, n, g, r, D].

    v_scale: like `weights`, [B, H, n, g, r, T]."""
    # Token scales of V go into the weights, relative to the block's largest.
    largest, kind = v_scale.amax(-1, keepdim=True), config.p_scale
    relative = v_scale / torch.where(largest > 0, largest, 1.0)
    if kind == "static":
        levels = weights * STATIC_LEVELS
        row_sum = levels.round().sum(-1) / STATIC_LEVELS
        codes = (levels * relative).round_()
        unit = largest / STATIC_LEVELS
    elif kind == "row":
        levels = weights * ROW_LEVELS
        row_sum = levels.round().sum(-1) / ROW_LEVELS
        products = levels * v_scale
        largest = products.amax(-1, keepdim=True)
        codes = (products * (ROW_LARGEST / torch.where(largest > 0, largest, 1.0))).round_()
        unit = largest / (ROW_LARGEST * ROW_LEVELS)
    else:
        row_sum = weights.sum(-1)
        weights = weights * relative
        p_scale = _tile_scale(weights, config.block_size)
        codes = (weights / p_scale[..., None]).round_()
        unit = largest * p_scale[..., None]
    product = codes.flatten(3, 4) @ v8
    return row_sum, product.unflatten(3, codes.shape[3:5]) * unit


def _tile_scale(weights: Tensor, tile: int) -> Tensor:
    """`s_P = max(P~ tile) / 119` of each tile of query rows, per row [B, H, n, g, r]."""
    rows = weights.shape[-2]
    largest = F.pad(weights.amax(-1), (0, -rows % tile)).unflatten(-1, (-1, tile)).amax(-1)
    scale = torch.where(largest > 0, largest / CODE_MAX, 1.0)
    return scale.repeat_interleave(tile, -1)[..., :rows]


def fold_blocks(rescale: Exponential, state: Accumulator, row_max: Tensor, row_sum: Tensor, out: Tensor) -> None:
    """Add blocks whose weights are relative to their own maximum: they are independent and share one rescale.

    row_max, row_sum: [B, H, n, g, r]; out: [B, H, n, g, r, D].
    """
    new_max = torch.maximum(state.row_max, row_max.amax(2))
    old = rescale(state.row_max - _finite(new_max))
    each = rescale(row_max - _finite(new_max)[:, :, None])
    state.row_sum.mul_(old).add_((row_sum * each).sum(2))
    state.out.mul_(old[..., None]).add_((out * each[..., None]).sum(2))
    state.row_max.copy_(new_max)


def _fold_in_turn(
    rescale: Exponential, state: Accumulator, row_max: Tensor, row_sum: Tensor, out: Tensor, seen: Tensor
) -> None:
    """Add blocks whose weights are relative to the running maximum: rescale by each change of it. A block that a row
    does not see causes no rescale (SAS at 0 is not 1)."""
    for j in range(row_max.shape[2]):
        old = torch.where(seen[:, :, j], rescale(state.row_max - _finite(row_max[:, :, j])), 1.0)
        state.row_sum.mul_(old).add_(row_sum[:, :, j])
        state.out.mul_(old[..., None]).add_(out[:, :, j])
        state.row_max.copy_(row_max[:, :, j])


def _finite(row_max: Tensor) -> Tensor:
    """A maximum to subtract: 0 where nothing was seen, so that -inf stays -inf and not NaN."""
    return torch.where(row_max == -torch.inf, 0.0, row_max)
