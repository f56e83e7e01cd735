"""The signed block Hadamard rotation of rows in registers (`flashq.rotation`).

Sums in float64, like the specification: sums of float32 values are exact there, so the order of summation does not
matter and results are bit-identical. Data centre GPUs add float64 at half the rate of float32 or better; integers or
pairs of float32 with the same range would need more instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The halves of flashq.rotation's sign bits: channel c is negated if bit c % 64 is set. As int32, because the type of
# constants above 2^31 differs between versions of Triton.
_LOW = tl.constexpr(0x7F4A7C15)
_HIGH = tl.constexpr(0x9E3779B9 - (1 << 32))


@triton.jit
def rotate(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate float32 [ROWS, WIDTH] in blocks of BLOCK channels; zero padding remains zero."""
    wide = (x * _signs(WIDTH)[None, :]).to(tl.float64)
    return (_hadamard(wide, ROWS, WIDTH, BLOCK) * tl.full([], BLOCK**-0.5, tl.float64)).to(tl.float32)


@triton.jit
def rotate_back(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """The inverse of `rotate`. Without EXACT it sums in float32, the precision of attention results."""
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
def _butterfly(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """Replace channels c and c + STRIDE by their sum and difference."""
    pairs = tl.permute(tl.reshape(x, (ROWS, WIDTH // (2 * STRIDE), 2, STRIDE)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))
