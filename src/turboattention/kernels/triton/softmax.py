"""Attention weights of one block against the block's own maximum, as INT8 (docs/numerics.md).

Weights are in units of 1/127. The exponentials: `sas` takes e^-n from the exponential unit and a cubic,
`sas2` takes 2^-n from exponent bits and a cubic, `exp` is exact. Arguments of the latter two are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import ROUND, ROUND_BITS, bits_of
from .visibility import masked

LEVELS = tl.constexpr(127.0)
ROW_LARGEST = tl.constexpr(126.96875)
FINE = tl.constexpr(256.0)  # resolution of the sum of weights with a scale per row, relative to 1/127
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

_SUM_OF_64 = tl.constexpr(0x30000000)  # -64 * ROUND_BITS modulo 2^32


@triton.jit
def as_float(x, SLOW: tl.constexpr):
    """int32 below 2^22 in magnitude to float32, exactly; by addition where conversion has a SLOW unit."""
    return (x + ROUND_BITS).to(tl.float32, bitcast=True) - ROUND if SLOW else x.to(tl.float32)


@triton.jit
def round_levels(weight, unit):
    """`weight * unit` rounded half to even, in the low bits of the result (int32)."""
    return bits_of(tl.fma(weight, unit, ROUND))


@triton.jit
def sum_of_levels(levels, AXIS: tl.constexpr):
    """Sum over 64 results of `round_levels`, float32: their high bits wrap and are subtracted."""
    return (tl.sum(levels, AXIS) + _SUM_OF_64).to(tl.float32)


@triton.jit
def exponential(x, FORM: tl.constexpr, CUT: tl.constexpr, threshold):
    """e^x (2^x but for "sas") for x <= 0, 1 at 0. Where CUT, zero below `threshold`; elsewhere what lies
    below it rounds to no level anyway."""
    if FORM == "exp":
        weight = tl.exp2(x)
    elif FORM == "sas2":
        z = tl.maximum(x, -24.0) + 0.5
        t = z + ROUND  # -floor(-x) in the low bits
        g = z - (t - ROUND)  # half less the fraction; the cubic is expanded about there
        p = tl.fma(tl.fma(tl.fma(g, 0.0391340, 0.1718548), g, 0.4902165), g, 0.7070363)
        weight = (bits_of(p) + (bits_of(t) << 23)).to(tl.float32, bitcast=True)
    else:
        z = tl.maximum(x, -8.0 if not CUT else -88.0) + 0.5
        n = (z + ROUND) - ROUND
        g = z - n
        p = tl.fma(tl.fma(tl.fma(g, 0.1025, 0.30885), g, 0.606475), g, 0.6063375)
        weight = tl.exp2(n * LOG2_E) * p
    if CUT and FORM != "exp":
        weight = tl.where(x < threshold, 0.0, weight)
    return weight


@triton.jit
def softcapped(x, cap):
    """`cap * tanh(x / cap)`; near 0, where the quotient cancels, by tanh's series."""
    y = x / cap
    square = tl.minimum(y * y, 1.0)
    series = tl.fma(tl.fma(tl.fma(62.0 / 2835.0, square, -17.0 / 315.0), square, 2.0 / 15.0), square, -1.0 / 3.0)
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return cap * tl.where(tl.abs(y) < 0.25, y + series * square * y, tl.where(y < 0, -far, far))


@triton.jit
def weigh(
    s, unit, mean, key, value_levels, visible, cap, threshold,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, SEEN: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Weights of 64 keys, along AXIS of s.

    s: float32 products times key scales; unit > 0, mean: per row, the unit of s and the logit to add;
    value_levels: per key, 127 times V's scale relative to the block's largest; ROW: INT8 weights with a scale per row,
    of which the largest is 127 (CUT must be set where FORM is not "exp"); visible: (begin, end, mask),
    the keys that each row sees (read if SEEN), and the argument of `visibility.masked`. CAP, MASK: softcap, and the
    kind of mask ("" for none).

    Returns INT8 weights with V's scales in them (in the low bits of int32), the sum of the weights without
    them in units of 1/127, the block's maximum, a logit (-inf if a row sees nothing), and per row the unit of an INT8
    weight, in units of 1/127 (ROW; otherwise undefined).
    """
    weight, row_sum, row_max = weights(
        s, unit, mean, key, visible, cap, threshold, FORM, CUT, ROW, SEEN, CAP, MASK, AXIS
    )
    value_levels = tl.expand_dims(value_levels, 1 - AXIS)
    if ROW:
        codes, share = row_codes(weight * value_levels, AXIS)
    else:
        codes = round_levels(weight, value_levels)
        share = row_max  # unused, but a value is needed: None cannot be returned here
    return codes, row_sum, row_max, share


@triton.jit
def row_codes(products, AXIS: tl.constexpr):
    """Products of weights and value scales as INT8 (in the low bits of int32), of which each row's largest is 127, and
    the unit of a code. 126.96875: with 127, scales of one half, which are common, would be rounding ties."""
    largest = tl.max(products, AXIS)
    largest = tl.where(largest > 0.0, largest, 1.0)
    return round_levels(products, tl.expand_dims(1.0 / largest * ROW_LARGEST, AXIS)), largest / ROW_LARGEST


@triton.jit
def weights(
    s, unit, mean, key, visible, cap, threshold,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, SEEN: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """As `weigh`, but with float weights, 1 at the maximum, instead of INT8 weights."""
    base: tl.constexpr = 1.0 if FORM == "sas" else 1.4426950408889634
    plain: tl.constexpr = not CAP and MASK == ""
    keys = tl.expand_dims(key, 1 - AXIS)
    x = s
    if not plain:
        x = x * tl.expand_dims(unit, AXIS) + tl.expand_dims(mean, AXIS)
        if CAP:
            x = softcapped(x, cap)
        if MASK != "":
            x = masked(x, visible[2], keys, AXIS, MASK)
    if SEEN:
        seen = (keys >= tl.expand_dims(visible[0], AXIS)) & (keys < tl.expand_dims(visible[1], AXIS))
        x = tl.where(seen, x, float("-inf"))
    row_max = tl.max(x, AXIS)
    against = row_max
    if SEEN or MASK != "":
        against = tl.where(row_max == float("-inf"), 0.0, row_max)
    # The difference first, then its unit: exactly zero at the maximum.
    x = x - tl.expand_dims(against, AXIS)
    if plain:
        x = x * tl.expand_dims(unit * base, AXIS)
        row_max = tl.where(row_max == float("-inf"), row_max, row_max * unit + mean) if SEEN else row_max * unit + mean
    else:
        x = tl.minimum(x, 0.0) * base
    weight = exponential(x, FORM, CUT, threshold)
    if ROW:
        row_sum = sum_of_levels(round_levels(weight, LEVELS * FINE), AXIS) / FINE
    else:
        row_sum = sum_of_levels(round_levels(weight, LEVELS), AXIS)
    return weight, row_sum, row_max


@triton.jit
def rescaled(row_max, block_max):
    """The new running maximum, and the rescale factors e^(old - new) of earlier results and of the block's."""
    new = tl.maximum(row_max, block_max)
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2((row_max - safe) * LOG2_E), tl.exp2((block_max - safe) * LOG2_E)


@triton.jit
def log_sum_exp(row_max, row_sum):
    """-inf if nothing was seen; `row_sum` is in units of 1/127."""
    return tl.where(row_sum > 0.0, row_max + tl.log2(tl.maximum(row_sum, 1.0) / LEVELS) * LN_2, float("-inf"))
