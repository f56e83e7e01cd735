"""Step and zero of each channel of a tile, by min-max or by search (`flashq.progressive`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_and_zero(codes, BITS: tl.constexpr, SEARCH: tl.constexpr):
    """int8 [tokens, channels] -> step and zero, int32 [channels]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    values = codes.to(tl.int32)
    low, high = tl.min(values, 0), tl.max(values, 0)
    # Steps are int8; only one bit could have larger ones.
    step = tl.minimum(tl.maximum((high - low + (LEVELS - 1)) // LEVELS, 1), 127 if BITS == 1 else 255 // LEVELS)
    # Rows that a crop decoded from a page may exceed 119; the range then ends at 127.
    zero = tl.where(high > 119, tl.minimum(low, 127 - step * LEVELS), low)
    if SEARCH:
        step, zero = _search(codes.to(tl.float32), step, zero, low + high, BITS)
    return step, zero


@triton.jit
def _search(values, widest, zero, middle, BITS: tl.constexpr):
    """The range with the least squared error among shrunken, centred and shifted ones; ties keep the earlier one."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    best, least = widest, _squared_error(values, widest, zero, BITS)
    # Below 4 bits, 16ths of the min-max step; at one bit, the optimal two levels lie much further inside the range.
    # At 4 and 5 bits, the min-max step and the next smaller integer.
    FIRST: tl.constexpr = 12 if BITS == 1 else 16
    for less in range(9 if BITS < 4 else 2):
        step = tl.maximum((widest * (FIRST - less) + 15) // 16 if BITS < 4 else widest - less, 1)
        for shift in range(3):
            quarter = tl.where(shift == 0, 0, 2 * shift - 3)  # 0, -1, 1
            # An arithmetic shift divides by 4 and rounds down.
            other = (2 * middle - 2 * step * LEVELS + quarter * step) >> 2
            other = tl.maximum(tl.minimum(other, 127 - step * LEVELS), -128)
            error = _squared_error(values, step, other, BITS)
            better = error < least
            best = tl.where(better, step, best)
            zero = tl.where(better, other, zero)
            least = tl.where(better, error, least)
    return best, zero


@triton.jit
def _squared_error(values, step, zero, BITS: tl.constexpr):
    """Squared distance to the nearest of `zero + k step`, 0 <= k < 2^BITS, summed over the tokens.

    Each absolute value folds the levels at their middle and halves their number. All values are halves of small
    integers, and the sum is at most 255^2 * 256 < 2^24, so float32 is exact.
    """
    step = step.to(tl.float32)
    middle = zero.to(tl.float32) + step * (((1 << BITS) - 1) * 0.5)
    distance = tl.abs(values - middle[None, :])
    if BITS >= 5:
        distance = tl.abs(distance - (step * 8.0)[None, :])
    if BITS >= 4:
        distance = tl.abs(distance - (step * 4.0)[None, :])
    if BITS >= 3:
        distance = tl.abs(distance - (step * 2.0)[None, :])
    if BITS >= 2:
        distance = tl.abs(distance - step[None, :])
    distance = distance - (step * 0.5)[None, :]
    return tl.sum(distance * distance, 0)
