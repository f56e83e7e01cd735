"""Stage 1 in registers: loads rows of floats and quantizes them to INT8 with a scale per row."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotation import rotate
from .rounding import bits_of, float_of, nearest_int8

_LARGEST = tl.constexpr(0x5D5E0B6B)  # the bits of 1e18, the largest magnitude that is accepted
_SMALLEST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def load_rows(x, offsets, wanted, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows of D channels at `offsets` (int64 [ROWS]) as float32 [ROWS, WIDTH], and check them.

    Returns the rows and whether each is finite and in range; rows that are not, or not `wanted`, are zeros. Rows that
    are not wanted are not read."""
    channel = tl.arange(0, WIDTH)[None, :]
    there = wanted[:, None] & (channel < D)
    rows = tl.load(x + (offsets[:, None] + channel), mask=there, other=0.0).to(tl.float32)
    # Compared as integers, the bits of magnitudes have the same order, with infinity and NaN largest.
    fine = tl.max(bits_of(rows) & 0x7FFFFFFF, 1) <= _LARGEST
    return tl.where(fine[:, None], rows, 0.0), fine


@triton.jit
def flag_nonfinite(flag, fine):
    """Set the flag unless all rows are finite and in range."""
    bad = tl.max((~fine).to(tl.int32), 0)
    tl.store(flag, 1, mask=bad > 0)


@triton.jit
def token_codes(x, GRID: tl.constexpr):
    """Quantize float32 [ROWS, WIDTH] to int8 with a scale per row, rounded up to 4 mantissa bits if GRID."""
    scale = tl.div_rn(float_of(tl.max(bits_of(x) & 0x7FFFFFFF, 1)), 119.0)
    if GRID:
        scale = float_of((bits_of(scale) + 0x7FFFF) & -0x80000)
    scale = tl.where(scale == 0.0, 1.0, tl.maximum(scale, _SMALLEST_SCALE))
    return nearest_int8(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))), scale


@triton.jit
def rounded_mean(total, count):
    """`total / count`, float64, as bfloat16, rounded to nearest even through float32."""
    # Divide, since multiplying by the inverse would round twice. Rounding in integers is the same on every device and
    # in the interpreter.
    bits = (total / count).to(tl.float32).to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def stage_rows(
    x,
    offsets,
    wanted,
    mean,
    mean_row,
    smoothed,
    flag,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Load the rows at `offsets`, rotate, smooth and quantize them: codes and scales.

    Row `mean_row` of `mean` is subtracted from rows that are `smoothed`. A row that is not finite gives zeros and sets
    the flag."""
    rows, fine = load_rows(x, offsets, wanted, D, WIDTH)
    flag_nonfinite(flag, fine)
    if ROTATE:
        rows = rotate(rows, ROWS, WIDTH, D & -D)
    if mean is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        taken = (wanted & fine & smoothed)[:, None] & (channel < D)
        off = tl.load(mean + mean_row.to(tl.int64)[:, None] * D + channel, mask=taken, other=0.0)
        rows = rows - off.to(tl.float32)
    return token_codes(rows, True)


@triton.jit
def store_codes(codes, row, wanted, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store `values` to rows `row` (int64 [ROWS]) of `codes` (contiguous, D channels)."""
    channel = tl.arange(0, WIDTH)[None, :]
    tl.store(codes + row[:, None] * D + channel, values, mask=wanted[:, None] & (channel < D))
