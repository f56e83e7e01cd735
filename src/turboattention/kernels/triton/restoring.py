"""Dequantizes packed pages to INT8 in registers, as operands of products with many query rows.

Octets of channels are loaded in storage order and rearranged by reshapes. The channels of keys remain in another order
(`halves`), which queries must have too: those with c % 8 < 4 first, then the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpacking import by_channels, by_rows, bytes_of, code, signed, stack, words_at
from .widths import lower_plane


@triton.jit
def halves(WIDE: tl.constexpr):
    """The channel at each offset of keys and queries, int32 [WIDE]: first those with c % 8 < 4."""
    offsets = tl.arange(0, WIDE)
    half = offsets % (WIDE // 2)
    return half // 4 * 8 + half % 4 + offsets // (WIDE // 2) * 4


# -- keys: octets of lines [tokens][4 channels] -----------------------------------------------------------------------


@triton.jit
def page_keys(page, offsets, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A page's keys, int8 [64, WIDE], undefined in octets past D; `offsets`: K's `section_offsets`."""
    LOWER: tl.constexpr = lower_plane(BITS)
    TOKENS: tl.constexpr = 64 if LOWER >= 4 else 16 * LOWER
    tl.static_assert(LOWER >= 2)
    octet = tl.arange(0, WIDE // 8)[:, None]
    t = tl.arange(0, TOKENS)[None, :]
    inside = None if D == WIDE else octet < D // 8
    words = words_at(page, offsets[0]) + octet * (16 * BITS)
    w = tl.load(words + t, mask=inside)
    if BITS == 8:
        low = _rows(signed(w), ASM)
        high = _rows(signed(tl.load(words + 64 + t, mask=inside)), ASM)
    else:
        bits = w
        if LOWER < BITS:
            # Tokens 16 apart share a byte; shift so that the bits of a tile are adjacent.
            bits = tl.load(words + 16 * LOWER + t % 16, mask=inside) >> (t // 16)
        step = words_at(page, offsets[1]) + octet * 2
        zero = words_at(page, offsets[2]) + octet * 2
        low = _half_of_keys(w, bits, step, zero, inside, 0, BITS, ASM)
        high = _half_of_keys(w, bits, step, zero, inside, 1, BITS, ASM)
    return stack(low, high, False)


@triton.jit
def _half_of_keys(w, bits, step, zero, inside, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    step = tl.load(step + HIGH, mask=inside)
    zero = tl.load(zero + HIGH, mask=inside)
    if lower_plane(BITS) == 4:
        keys = _rows(by_channels(code(w, bits, HIGH, BITS), step, zero), ASM)
    else:
        first = code(w, bits, 2 * HIGH, BITS)
        second = code(w, bits, 2 * HIGH + 1, BITS)
        keys = stack(_rows(by_channels(first, step, zero), ASM), _rows(by_channels(second, step, zero), ASM), True)
    return keys


@triton.jit
def _rows(words, ASM: tl.constexpr):
    """Words of four channels [octets, tokens] -> int8 [tokens, WIDE / 2]."""
    return bytes_of(tl.trans(words), ASM)


# -- values: octets of lines [quads of tokens][8 channels][4 tokens] --------------------------------------------------


@triton.jit
def page_values(
    page, offsets, FIRST: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):
    """WIDE channels of a page's values from FIRST on, int8 [WIDE, 64], undefined in octets past D; `offsets`: V's
    `section_offsets`."""
    LOWER: tl.constexpr = lower_plane(BITS)
    QUADS: tl.constexpr = 2 * LOWER
    tl.static_assert(LOWER >= 2)
    octet = FIRST // 8 + tl.arange(0, WIDE // 8)[:, None, None]
    quad = tl.arange(0, QUADS)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    inside = None if FIRST + WIDE <= D else octet < D // 8
    words = words_at(page, offsets[0]) + octet * (16 * BITS) + c
    w = tl.load(words + quad * 8, mask=inside)
    if BITS == 8:
        values = _columns(signed(w), QUADS, WIDE, ASM)
    else:
        bits = w
        if LOWER < BITS:
            bits = tl.load(words + 16 * LOWER + quad % 2 * 8, mask=inside) >> (quad // 2)
        step = tl.load(page + offsets[1] + octet * 8 + c, mask=inside).to(tl.int32)
        zero = tl.load(page + offsets[2] + octet * 8 + c, mask=inside).to(tl.int32)
        first = _part_of_values(w, bits, step, zero, 0, WIDE, QUADS, BITS, ASM)
        second = _part_of_values(w, bits, step, zero, 1, WIDE, QUADS, BITS, ASM)
        values = stack(first, second, False)
        if LOWER < 4:
            first = _part_of_values(w, bits, step, zero, 2, WIDE, QUADS, BITS, ASM)
            last = _part_of_values(w, bits, step, zero, 3, WIDE, QUADS, BITS, ASM)
            values = stack(values, stack(first, last, False), False)
    return values


@triton.jit
def _part_of_values(
    w, bits, step, zero, F: tl.constexpr, WIDE: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    return _columns(by_rows(code(w, bits, F, BITS), step, zero), QUADS, WIDE, ASM)


@triton.jit
def _columns(words, QUADS: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Words of four tokens [octets, quads, 8] -> int8 [WIDE, tokens]."""
    return bytes_of(tl.reshape(tl.permute(words, (0, 2, 1)), (WIDE, QUADS)), ASM)
