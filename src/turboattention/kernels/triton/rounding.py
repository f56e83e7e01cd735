"""Rounding to integers by one addition, and floats as their bits."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: added to a float of magnitude below 2^22, it leaves the nearest integer, ties to even, in
# the lowest bits, on top of its own (ROUND_BITS).
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def bits_of(x):
    """float32 -> its bits, int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """int32 bits -> float32."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nearest(x):
    """round_half_even of float32 below 2^22 in magnitude, as int32.

    Exact only where the compiler does not fuse the addition with a product in `x`: launch with
    `enable_fp_fusion=False`, or divide last.
    """
    return bits_of(x + ROUND) - ROUND_BITS


@triton.jit
def nearest_int8(x):
    """round_half_even of float32 within int8's range."""
    return bits_of(x + ROUND).to(tl.int8)
