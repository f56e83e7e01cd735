"""Rounding to integers by one addition, and bit casts."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: the bits of x + ROUND, |x| < 2^22, are ROUND_BITS plus the nearest integer of x (ties to even).
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

    Exact only if the compiler does not fuse the addition with a product in `x`: launch with `enable_fp_fusion=False`,
    or let a division be the last operation of `x`.
    """
    return bits_of(x + ROUND) - ROUND_BITS


@triton.jit
def nearest_int8(x):
    """round_half_even of float32 within the range of int8."""
    return bits_of(x + ROUND).to(tl.int8)
