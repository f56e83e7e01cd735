"""The signed block Hadamard rotation of rows in registers (`flashq.rotation`).

Summed in float64, as the specification is: sums of float32 values are exact there, so that the order of
summation does not matter and results agree to the last bit. Data centre GPUs add float64 at half the rate
of float32 or better; integers or pairs of float32 of the same range take more instructions than that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Bit c % 64 of flashq.rotation's identity number is set where channel c changes its sign. Two halves,
# as int32: constants above 2^31 differ in type between versions of Triton.
_LOW = tl.constexpr(0x7F4A7C15)
_HIGH = tl.constexpr(0x9E3779B9 - (1 << 32))


@triton.jit
def rotate(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [ROWS, WIDTH] -> rotated in blocks of BLOCK channels; zeros of the padding stay zeros."""
    wide = (x * _signs(WIDTH)[None, :]).to(tl.float64)
    return (_hadamard(wide, ROWS, WIDTH, BLOCK) * tl.full([], BLOCK**-0.5, tl.float64)).to(tl.float32)


@triton.jit
def rotate_back(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """The inverse of `rotate`; where not EXACT summed in float32, in which results of attention are."""
    if EXACT:
        wide = _hadamard(x.to(tl.float64), ROWS, WIDTH, BLOCK) * tl.full([], BLOCK**-0.5, tl.float64)
        x = wide.to(tl.float32) * _signs(WIDTH)[None, :]
    else:
        x = _hadamard(x, ROWS, WIDTH, BLOCK) * (_signs(WIDTH) * BLOCK**-0.5)[None, :]
    return x


@triton.jit
def _signs(WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    word = tl.where((channel & 32) == 0, _LOW, _HIGH)
    return tl.where(((word >> (channel & 31)) & 1) == 0, 1.0, -1.0)


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(8):
        if (1 << i) < BLOCK:
            x = _butterfly(x, ROWS, WIDTH, 1 << i)
    return x


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr):
    """Sum and difference of channels that stand `APART` from each other, in their places."""
    pairs = tl.permute(tl.reshape(x, (ROWS, WIDTH // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))
