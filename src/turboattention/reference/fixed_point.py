"""The softmax in 16-bit integers, starting from the integer products of queries and keys (docs/numerics.md, "SAS in
16-bit integers"). All values equal those that kernels compute in 16-bit lanes.

Shapes: B batch, H KV heads, n blocks at a time, g query heads per KV head, r query rows, T tokens per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..softmax import SAS16_OCTAVE, SAS16_ONE, sas16_power

_UNSEEN = -32768
"""A value below every score."""
_UNITS = 32768
"""The divisor of a product of two numbers in units of 1 / `SAS16_ONE`."""
_FARTHEST, _STEEPEST = 15.0 * SAS16_OCTAVE, 8191.0
_SUMS = 2048
"""The weight 1 in sums of weights."""
_LEVELS = 127


@dataclass(frozen=True)
class FixedWeights:
    """weights: int32 [B, H, n, g, r, T] in units of 1 / `SAS16_ONE`, 0 where unseen. row_max: [B, H, n, g, r], the
    largest logit of each row in a block, -inf where it sees none."""

    weights: Tensor
    row_max: Tensor


def takes_fixed_point(config: TurboConfig, scale: float, softcap: float | None, mask: Tensor | None) -> bool:
    """Whether "sas16" computes weights from products in fixed point. Otherwise it is applied to floating-point logits:
    if logits themselves are needed, with the paper's maximum and weight scales, and if results must not depend on
    tokens that a query does not see, since such a token may have the block's largest scale."""
    plain = config.row_max == "block" and config.p_scale != "tile" and config.rescale == "exact"
    boolean = mask is None or mask.dtype == torch.bool
    return plain and scale > 0 and softcap is None and boolean and not config.stored_prefill


def product_shift(codes: Tensor) -> Tensor:
    """int32 [...]: the shift after which products of queries [..., D] (integers) with INT8 keys fit 16 bits."""
    largest = 127 * codes.abs().sum(-1).to(torch.int64)
    return (largest[..., None] >> torch.arange(9, device=codes.device) > 32767).sum(-1).to(torch.int32)


def fixed_weights(
    products: Tensor, unit: Tensor, shift: Tensor, mean: Tensor | None, k_scale: Tensor, seen: Tensor
) -> FixedWeights:
    """Weights from products.

    Args:
        products: [B, H, n, g, r, T], integers; unit: [B, H, n, g, r] and k_scale [B, H, n, T], whose product is the
            unit of the products; shift: `product_shift`, [B, H, n, g, r].
        mean: [B, H, n, g, r], added to the logits of a row, or None.
        seen: bool [B, H or 1, n, g or 1, r, T].
    """
    keys, top_scale = _relative(k_scale)
    keys, top_scale = keys[:, :, :, None, None], top_scale[:, :, :, None]
    power = torch.exp2(shift.to(unit.dtype))
    logit = unit * top_scale * power * unit.new_tensor(_UNITS / SAS16_ONE)
    slope = (logit * unit.new_tensor(math.log2(math.e) * SAS16_OCTAVE)).clamp(max=_STEEPEST)
    steps = torch.frexp(slope).exponent.clamp(min=0)
    factor = (slope * torch.exp2(16.0 - steps.to(unit.dtype))).round().clamp(max=65535.0).to(torch.int64)
    most = (_FARTHEST / slope.clamp(min=1e-30)).clamp(max=65535.0).to(torch.int64) + 1
    most = torch.minimum(most, 65535 >> steps.to(torch.int64))

    score = _product(products.to(torch.int64) >> shift[..., None], keys)
    score = torch.where(seen, score, _UNSEEN)
    top = score.amax(-1)
    difference = torch.minimum(top[..., None] - score, most[..., None])
    distance = ((difference << steps[..., None]) * factor[..., None]) >> 16
    weights = torch.where(seen, sas16_power(distance), 0)
    row_max = (top.to(unit.dtype) + torch.where(shift > 0, 0.5, 0.0).to(unit.dtype)) * logit
    if mean is not None:
        row_max = row_max + mean
    return FixedWeights(weights, torch.where(top == _UNSEEN, -torch.inf, row_max))


def fixed_values(fixed: FixedWeights, v8: Tensor, v_scale: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """Per block: sum of the weights [B, H, n, g, r], and weights times values [B, H, n, g, r, D].

    v8: INT8 values held in float [B, H, n, T, D]; v_scale: [B, H, n, T]. by_row: INT8 weights have a scale per row and
    block, not 1 / 127.
    """
    values, top_scale = _relative(v_scale)
    row_sum = _product(fixed.weights, torch.tensor(_SUMS)).sum(-1).to(v8.dtype) / _SUMS
    products = _product(fixed.weights, values[:, :, :, None, None])
    if by_row:
        largest = products.amax(-1)
        levels = (v8.new_tensor(_LEVELS * _UNITS) / largest.clamp(min=1).to(v8.dtype)).clamp(max=SAS16_ONE)
        levels = levels.to(torch.int64)
        both = v8.new_tensor((_UNITS / SAS16_ONE) ** 2)
        unit = top_scale[:, :, :, None] * both / levels.to(v8.dtype)
    else:
        levels = torch.full_like(products[..., 0], _LEVELS)
        unit = top_scale[:, :, :, None] / _LEVELS
    codes = _product(products, levels[..., None]).to(v8.dtype)
    out = (codes.flatten(3, 4) @ v8).unflatten(3, codes.shape[3:5])
    return row_sum, out * unit[..., None]


def _relative(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [..., T] over the largest, int64 in units of 1 / `SAS16_ONE`, and the largest [..., 1]."""
    top = scale.amax(-1, keepdim=True)
    relative = (scale / torch.where(top > 0, top, 1.0) * SAS16_ONE).round()
    return relative.to(torch.int64), top


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y / 2^15, rounded."""
    return (x.to(torch.int64) * y + (1 << 14)) >> 15
