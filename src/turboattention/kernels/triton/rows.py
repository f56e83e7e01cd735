"""Rows of floats as kernels read them, and as INT8 with a scale each: stage 1 in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotation import rotate
from .rounding import bits_of, float_of, nearest_int8

_LARGEST = tl.constexpr(0x5D5E0B6B)  # the bits of 1e18: values beyond it are refused
_SMALLEST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def load_rows(x, offsets, wanted, order, order_row, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D channels at `offsets` (int64 [ROWS]) as float32 [ROWS, WIDTH], and which of them are
    finite and in range. The others, and those not wanted, are zeros; the latter are not read.

    order: uint8, the channels in D places of each row `order_row` (int32 [ROWS]), or None: as they are."""
    place = tl.arange(0, WIDTH)[None, :]
    there = wanted[:, None] & (place < D)
    if order is None:
        at = offsets[:, None] + place
    else:
        at = offsets[:, None] + tl.load(order + order_row[:, None] * D + place, mask=there, other=0)
    rows = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    # Magnitudes' bits order like the magnitudes and put NaN and infinity on top.
    fine = tl.max(bits_of(rows) & 0x7FFFFFFF, 1) <= _LARGEST
    return tl.where(fine[:, None], rows, 0.0), fine


@triton.jit
def tell(flag, fine):
    """Raise the flag unless every row is fine."""
    bad = tl.max((~fine).to(tl.int32), 0)
    tl.store(flag, 1, mask=bad > 0)


@triton.jit
def token_codes(x, GRID: tl.constexpr):
    """float32 [ROWS, WIDTH] -> int8 codes and a scale for every row: on the grid of 4 mantissa bits or exact."""
    scale = tl.div_rn(float_of(tl.max(bits_of(x) & 0x7FFFFFFF, 1)), 119.0)
    if GRID:
        scale = float_of((bits_of(scale) + 0x7FFFF) & -0x80000)
    scale = tl.where(scale == 0.0, 1.0, tl.maximum(scale, _SMALLEST_SCALE))
    return nearest_int8(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))), scale


@triton.jit
def stage_rows(
    x,
    offsets,
    wanted,
    mean,
    mean_row,
    smoothed,
    order,
    order_row,
    flag,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Rows at `offsets`, put in `order` and rotated, those `smoothed` less row `mean_row` of `mean` -> codes and
    scales. order: as in `load_rows`, of keys that are not rotated.

    A row that is not finite gives zeros and raises the flag."""
    rows, fine = load_rows(x, offsets, wanted, order, order_row, D, WIDTH)
    tell(flag, fine)
    if ROTATE:
        rows = rotate(rows, ROWS, WIDTH, D & -D)
    if mean is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        taken = (wanted & fine & smoothed)[:, None] & (channel < D)
        rows = rows - tl.load(mean + mean_row.to(tl.int64)[:, None] * D + channel, mask=taken, other=0.0)
    return token_codes(rows, True)


@triton.jit
def store_codes(codes, row, wanted, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of `codes` (contiguous, D channels) at `row` (int64 [ROWS])."""
    channel = tl.arange(0, WIDTH)[None, :]
    tl.store(codes + row[:, None] * D + channel, values, mask=wanted[:, None] & (channel < D))
