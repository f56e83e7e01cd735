"""Extracts the fields of packed bytes, four bytes per 32-bit word, and arranges them in registers.

Codes are loaded as words; a shift and a mask extract a field of all four bytes (flashq.packing). This determines which
bytes share a register, instead of leaving it to the compiler. Words are signed, because the type of constants above
2^31 differs between versions of Triton; masks remove the sign bits of arithmetic shifts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .widths import lower_plane

_SIGNS = tl.constexpr(0x80808080 - (1 << 32))
_OTHERS = tl.constexpr(0x7F7F7F7F)
_ONES = tl.constexpr(0x01010101)


@triton.jit
def words_at(page, offset):
    """A pointer to int32 words at a byte offset, a multiple of 4."""
    return (page + offset).to(tl.pointer_type(tl.int32))


@triton.jit
def field(w, F: tl.constexpr, BITS: tl.constexpr):
    """Field F of the bytes of codes' lower plane."""
    WIDTH: tl.constexpr = lower_plane(BITS)
    return (w >> (WIDTH * F)) & (((1 << WIDTH) - 1) * _ONES)


@triton.jit
def highest(w, F: tl.constexpr, BITS: tl.constexpr):
    """Bit F of the plane of highest bits, shifted to its position in codes."""
    w = w >> (F - BITS + 1) if F > BITS - 1 else w << (BITS - 1 - F)
    return w & ((1 << BITS - 1) * _ONES)


@triton.jit
def code(w, bits, F: tl.constexpr, BITS: tl.constexpr):
    """Codes of field F. The highest bit of those that have two planes is bit `lower_plane F` of `bits`."""
    x = field(w, F, BITS)
    if lower_plane(BITS) < BITS:
        x |= highest(bits, lower_plane(BITS) * F, BITS)
    return x


@triton.jit
def signed(w):
    """INT8 values from the bytes of 8-bit pages, X8 + 128."""
    return w ^ _SIGNS


@triton.jit
def bytes_of(w, ASM: tl.constexpr):
    """int32 [m, n] -> int8 [m, 4 n]: the bytes of each word, lowest first; no instructions."""
    m: tl.constexpr = w.shape[0]
    n: tl.constexpr = w.shape[1]
    if ASM == "ptx":
        # An opaque move: otherwise the compiler extracts the bytes one by one from the operands of w.
        w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1)
    even = tl.join(w.to(tl.int8), (w >> 16).to(tl.int8))
    odd = tl.join((w >> 8).to(tl.int8), (w >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (m, 4 * n))


@triton.jit
def by_channels(code, step, zero):
    """`code * step + zero` modulo 2^8 in each byte, where bytes are channels with different steps and zeros."""
    low = ((code & 255) * (step & 255) + (zero & 255)) & 255
    low |= ((((code >> 8) & 255) * ((step >> 8) & 255) + ((zero >> 8) & 255)) & 255) << 8
    high = (((code >> 16) & 255) * ((step >> 16) & 255) + ((zero >> 16) & 255)) & 255
    high |= ((((code >> 24) & 255) * ((step >> 24) & 255) + ((zero >> 24) & 255)) & 255) << 8
    return low | (high << 16)


@triton.jit
def by_rows(code, step, zero):
    """The same where all bytes of a word belong to one channel, so that `step` and `zero` are one byte each.

    Products do not carry into the next byte, and the sum is computed without carries between bytes."""
    x = code * step
    z = zero * _ONES
    return ((x & _OTHERS) + (z & _OTHERS)) ^ ((x ^ z) & _SIGNS)


@triton.jit
def stack(a, b, ROWS: tl.constexpr):
    """[m, k] and [m, k] -> [2 m, k] (ROWS) or [m, 2 k]; no instructions."""
    m: tl.constexpr = a.shape[0]
    k: tl.constexpr = a.shape[1]
    if ROWS:
        both = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * m, k))
    else:
        both = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (m, 2 * k))
    return both


@triton.jit
def interleave(a, b):
    """[m, k] and [m, k] -> [m, 2 k], with alternating columns; no instructions."""
    m: tl.constexpr = a.shape[0]
    k: tl.constexpr = a.shape[1]
    return tl.reshape(tl.join(a, b), (m, 2 * k))
