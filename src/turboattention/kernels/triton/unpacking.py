"""Fields of packed bytes, four to a 32-bit word, and how they are put side by side in registers.

Codes are loaded as words, and a shift and a mask take a field of all four bytes apart (flashq.packing). Which bytes
share a register is then in the code, not the compiler's choice. Words are signed: constants above 2^31 differ in type
between versions of Triton, and what an arithmetic shift brings in is masked away.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIGNS = tl.constexpr(0x80808080 - (1 << 32))
_OTHERS = tl.constexpr(0x7F7F7F7F)
_ONES = tl.constexpr(0x01010101)


@triton.jit
def words_at(page, offset):
    """A pointer to int32 words at a byte offset that is a multiple of 4."""
    return (page + offset).to(tl.pointer_type(tl.int32))


@triton.jit
def field(w, F: tl.constexpr, BITS: tl.constexpr):
    """The F-th codes of a plane's bytes; of five or three bits, the lower ones."""
    WIDTH: tl.constexpr = 4 if BITS >= 4 else 2 if BITS >= 2 else 1
    return (w >> (WIDTH * F)) & (((1 << WIDTH) - 1) * _ONES)


@triton.jit
def highest(w, F: tl.constexpr, BITS: tl.constexpr):
    """The F-th bits of the plane of highest ones, as what they add to codes of three or five bits."""
    w = w >> (F - BITS + 1) if F > BITS - 1 else w << (BITS - 1 - F)
    return w & ((1 << BITS - 1) * _ONES)


@triton.jit
def code(w, bits, F: tl.constexpr, BITS: tl.constexpr):
    """The F-th codes of a plane; with the highest ones of a field, every fourth (five bits) or other of `bits`."""
    x = field(w, F, BITS)
    if BITS == 5 or BITS == 3:
        x |= highest(bits, (4 if BITS == 5 else 2) * F, BITS)
    return x


@triton.jit
def signed(w):
    """INT8 of the bytes that 8-bit pages hold, X8 + 128."""
    return w ^ _SIGNS


@triton.jit
def bytes_of(w, ASM: tl.constexpr):
    """int32 [m, n] -> int8 [m, 4 n]: a word's bytes side by side, the lowest first; free in registers."""
    m: tl.constexpr = w.shape[0]
    n: tl.constexpr = w.shape[1]
    if ASM == "ptx":
        # A move that the compiler cannot see through: else it takes bytes out of what w was made of, one by one.
        w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1)
    even = tl.join(w.to(tl.int8), (w >> 16).to(tl.int8))
    odd = tl.join((w >> 8).to(tl.int8), (w >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (m, 4 * n))


@triton.jit
def by_channels(code, step, zero):
    """`code * step + zero` in each byte, which wraps: a word's bytes are channels with steps of their own."""
    low = ((code & 255) * (step & 255) + (zero & 255)) & 255
    low |= ((((code >> 8) & 255) * ((step >> 8) & 255) + ((zero >> 8) & 255)) & 255) << 8
    high = (((code >> 16) & 255) * ((step >> 16) & 255) + ((zero >> 16) & 255)) & 255
    high |= ((((code >> 24) & 255) * ((step >> 24) & 255) + ((zero >> 24) & 255)) & 255) << 8
    return low | (high << 16)


@triton.jit
def by_rows(code, step, zero):
    """The same where a word's bytes share a channel, whose step and zero are bytes: no product carries into the next
    byte, and no sum may."""
    x = code * step
    z = zero * _ONES
    return ((x & _OTHERS) + (z & _OTHERS)) ^ ((x ^ z) & _SIGNS)


@triton.jit
def stack(a, b, ROWS: tl.constexpr):
    """[m, k] and [m, k] -> [2 m, k] (ROWS) or [m, 2 k]; free in registers."""
    m: tl.constexpr = a.shape[0]
    k: tl.constexpr = a.shape[1]
    if ROWS:
        both = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * m, k))
    else:
        both = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (m, 2 * k))
    return both


@triton.jit
def interleave(a, b):
    """[m, k] and [m, k] -> [m, 2 k], columns in turns; free in registers."""
    m: tl.constexpr = a.shape[0]
    k: tl.constexpr = a.shape[1]
    return tl.reshape(tl.join(a, b), (m, 2 * k))
