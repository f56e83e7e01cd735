"""Stage 2: INT8 to 5, 4, 3, 2 or 1 bits with a step and zero per channel, in integers.

`step = max(1, ceil((hi - lo) / (2^bits - 1)))` (at most 127), `zero = lo`,
`code = clip(round_half_even((X8 - zero) / step), 0, 2^bits - 1)`, `X8' = code step + zero`.

X8' always fits in int8: INT8 values of stage 1 are at most 119, which leaves room for rounding. Rows that a crop
decoded from a page may exceed 119; the range is then moved, and narrowed if necessary, to end at 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, DtypeError, ShapeError
from .packing import PLANES
from .symmetric import CODE_MAX

_LARGEST_STEP = 127
"""Steps are int8. Larger ones could only occur at one bit, where the search hardly ever chooses them."""


def _candidate_steps(widest: Tensor, bits: int) -> list[Tensor]:
    """The steps that the range search tries, given the min-max step; few, since each costs passes over the block.

    Below 4 bits, 16ths of the min-max step from 16/16 down to 8/16 (one bit: from 12/16 down to 4/16, since the optimal
    two levels lie much further inside the range than the optimal four). At 4 and 5 bits, the optimal range is close to
    min-max, but the step is a small integer that min-max rounds up: that step and the next smaller integer.
    """
    if bits >= 4:
        return [widest, (widest - 1).clamp_(min=1)]
    shrinks = range(12, 3, -1) if bits == 1 else range(16, 7, -1)
    return [((widest * shrink + 15) // 16).clamp_(min=1) for shrink in shrinks]


def progressive_quantize(codes: Tensor, bits: int, search: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compress one tile of INT8 codes, with a step and a zero per channel.

    Args:
        codes: int8 [..., T, D]; all T rows are one tile.
        bits: 8 (lossless), 5, 4, 3, 2 or 1.
        search: choose the step and zero with the least squared error among min-max and smaller, shifted ranges. The
            format does not change.

    Returns:
        code uint8 [..., T, D] below 2^bits (unpacked); step (1 to 127) and zero, int8 [..., 1, D].

    Raises:
        ConfigError: another width. DtypeError: codes are not int8. ShapeError: no tokens.

    Source: TurboAttention (arXiv 2412.08585), FlashQ stage 2; the paper has 4 and 2 bits, and no search.
    """
    if bits not in PLANES:
        raise ConfigError(f"bits: expected one of {', '.join(map(str, PLANES))}, got {bits!r}")
    if codes.dtype != torch.int8:
        raise DtypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.dim() < 2 or codes.shape[-2] == 0:
        raise ShapeError(f"codes: expected [..., tokens, channels] with at least one token, got {tuple(codes.shape)}")
    values = codes.to(torch.int16)
    levels = (1 << bits) - 1
    low, high = values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)
    step = ((high - low + (levels - 1)) // levels).clamp_(1, min(_LARGEST_STEP, 255 // levels))
    zero = torch.where(high > CODE_MAX, torch.minimum(low, 127 - step * levels), low)
    if search and bits < 8:
        step, zero = _search(values, (step, zero), low + high, bits)
    return _encode(values, step, zero, levels).to(torch.uint8), step.to(torch.int8), zero.to(torch.int8)


def progressive_dequantize(code: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """`code * step + zero`: code uint8 [..., T, D], step and zero int8 [..., 1, D] (`progressive_quantize`) -> int8
    [..., T, D]."""
    return (code.to(torch.int16) * step.to(torch.int16) + zero.to(torch.int16)).to(torch.int8)


def _encode(values: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """`clip(round_half_even((values - zero) / step), 0, levels)` as int16.

    A float32 quotient of integers this small is a tie only if the exact quotient is, so the rounding is exact.
    """
    quotient = (values - zero).to(torch.float32) / step.to(torch.float32)
    return quotient.round_().clamp_(0, levels).to(torch.int16)


def _search(values: Tensor, widest: tuple[Tensor, Tensor], middle: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The (step, zero) with the least squared error; `middle` is min + max of the data.

    Candidates: min-max (`widest`), then `_candidate_steps`, each with a range centred on the data, and shifted by a
    quarter of a step down and up. Both ends of a range fit in int8. Ties keep the earlier candidate.
    """
    levels = (1 << bits) - 1
    best_step, best_zero = widest
    best_error = _squared_error(values, best_step, best_zero, levels)
    for step in _candidate_steps(widest[0], bits):
        for quarter in (0, -1, 1):
            zero = torch.div(2 * middle - 2 * step * levels + quarter * step, 4, rounding_mode="floor")
            zero = torch.minimum(zero, 127 - step * levels).clamp_(min=-128)
            error = _squared_error(values, step, zero, levels)
            better = error < best_error
            best_step = torch.where(better, step, best_step)
            best_zero = torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
    return best_step, best_zero


def _squared_error(values: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Sum over the tile of the squared difference, int32 (at most 255^2 * 256 < 2^24)."""
    difference = _encode(values, step, zero, levels) * step + zero - values
    return difference.to(torch.int32).square_().sum(-2, keepdim=True, dtype=torch.int32)
