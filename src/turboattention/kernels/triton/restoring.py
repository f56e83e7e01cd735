"""Packed pages back to INT8 in registers, as operands of products with many query rows.

Octets of channels are read as they lie, and put in order by views of the tile. Keys come with their channels in
another order, in which queries are to come too (`halves`): channels c % 8 < 4 first, then the others, as fields of
a byte hold them. Where ASM is "ptx" four bytes share an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpacking import as_int8, field, shifted, stack, third


@triton.jit
def halves(WIDE: tl.constexpr):
    """The channel at each place of keys and queries, int32 [WIDE]."""
    place = tl.arange(0, WIDE)
    half = place % (WIDE // 2)
    return half // 4 * 8 + half % 4 + place // (WIDE // 2) * 4


# -- keys: octets of lines [tokens][4 channels] -----------------------------------------------------------------------


@triton.jit
def page_keys(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A page's keys, int8 [64, WIDE], anything past D; `place`: of K, as in `places.places_of`."""
    TOKENS: tl.constexpr = 64 if BITS >= 4 else 32
    octet = tl.arange(0, WIDE // 8)[:, None, None]
    t = tl.arange(0, TOKENS)[None, :, None]
    c = tl.arange(0, 4)[None, None, :]
    inside = None if D == WIDE else octet < D // 8
    line = page + place[0] + octet * (64 * BITS) + c
    b = tl.load(line + t * 4, mask=inside)
    if BITS == 8:
        low = _rows(as_int8(b, ASM), TOKENS, WIDE)
        high = _rows(as_int8(tl.load(line + 256 + t * 4, mask=inside), ASM), TOKENS, WIDE)
    else:
        thirds = b
        if BITS == 3:
            # Tokens 16 apart share a byte: its bits are shifted so that those of a tile stand side by side.
            thirds = tl.load(line + 128 + t % 16 * 4, mask=inside)
            thirds = shifted(thirds, tl.broadcast_to((t // 16).to(tl.uint8), thirds.shape), ASM)
        step = page + place[1] + octet * 8 + c
        zero = page + place[2] + octet * 8 + c
        low = _half_of_keys(b, thirds, step, zero, inside, 0, WIDE, BITS, ASM)
        high = _half_of_keys(b, thirds, step, zero, inside, 1, WIDE, BITS, ASM)
    return stack(low, high, False)


@triton.jit
def _half_of_keys(
    b, thirds, step, zero, inside, HIGH: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):
    step = tl.load(step + 4 * HIGH, mask=inside)
    zero = tl.load(zero + 4 * HIGH, mask=inside)
    if BITS == 4:
        keys = _rows(_by_channels(field(b, HIGH, BITS, ASM), step, zero, ASM), 64, WIDE)
    else:
        first = field(b, 2 * HIGH, BITS, ASM)
        second = field(b, 2 * HIGH + 1, BITS, ASM)
        if BITS == 3:
            first |= third(thirds, 4 * HIGH, ASM)
            second |= third(thirds, 4 * HIGH + 2, ASM)
        first = _rows(_by_channels(first, step, zero, ASM), 32, WIDE)
        keys = stack(first, _rows(_by_channels(second, step, zero, ASM), 32, WIDE), True)
    return keys.to(tl.int8, bitcast=True)


@triton.jit
def _rows(lines, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """[octets, tokens, 4] -> [tokens, WIDE / 2]."""
    return tl.reshape(tl.permute(lines, (1, 0, 2)), (TOKENS, WIDE // 2))


# -- values: octets of lines [quads of tokens][8 channels][4 tokens] --------------------------------------------------


@triton.jit
def page_values(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A page's values, int8 [WIDE, 64], anything past D; `place`: of V, likewise."""
    QUADS: tl.constexpr = 2 * BITS if BITS >= 4 else 4
    octet = tl.arange(0, WIDE // 8)[:, None, None, None]
    quad = tl.arange(0, QUADS)[None, :, None, None]
    c = tl.arange(0, 8)[None, None, :, None]
    t = tl.arange(0, 4)[None, None, None, :]
    inside = None if D == WIDE else octet < D // 8
    line = page + place[0] + octet * (64 * BITS) + (c * 4 + t)
    b = tl.load(line + quad * 32, mask=inside)
    if BITS == 8:
        values = _columns(as_int8(b, ASM), QUADS, WIDE)
    else:
        thirds = b
        if BITS == 3:
            thirds = tl.load(line + 128 + quad % 2 * 32, mask=inside)
            thirds = shifted(thirds, tl.broadcast_to((quad // 2).to(tl.uint8), thirds.shape), ASM)
        step = tl.load(page + place[1] + octet * 8 + c, mask=inside)
        zero = tl.load(page + place[2] + octet * 8 + c, mask=inside)
        first = _part_of_values(b, thirds, step, zero, 0, WIDE, QUADS, BITS, ASM)
        second = _part_of_values(b, thirds, step, zero, 1, WIDE, QUADS, BITS, ASM)
        values = stack(first, second, False)
        if BITS < 4:
            first = _part_of_values(b, thirds, step, zero, 2, WIDE, QUADS, BITS, ASM)
            last = _part_of_values(b, thirds, step, zero, 3, WIDE, QUADS, BITS, ASM)
            values = stack(values, stack(first, last, False), False)
    return values


@triton.jit
def _part_of_values(
    b, thirds, step, zero, F: tl.constexpr, WIDE: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    code = field(b, F, BITS, ASM)
    if BITS == 3:
        code |= third(thirds, 2 * F, ASM)
    return _columns(_by_rows(code, step, zero, ASM).to(tl.int8, bitcast=True), QUADS, WIDE)


@triton.jit
def _columns(lines, QUADS: tl.constexpr, WIDE: tl.constexpr):
    """[octets, quads, 8, 4] -> [WIDE, tokens]."""
    return tl.reshape(tl.permute(lines, (0, 2, 1, 3)), (WIDE, 4 * QUADS))


# -- steps and zeros --------------------------------------------------------------------------------------------------


@triton.jit
def _by_channels(code, step, zero, ASM: tl.constexpr):
    """`code * step + zero` in bytes, which wrap: four neighbours are channels with steps of their own."""
    if ASM == "ptx":
        code = tl.inline_asm_elementwise(
            """{
            .reg .b32 c<4>, s<4>, z<4>;
            bfe.u32 c0, $1, 0, 8; bfe.u32 c1, $1, 8, 8; bfe.u32 c2, $1, 16, 8; bfe.u32 c3, $1, 24, 8;
            bfe.u32 s0, $2, 0, 8; bfe.u32 s1, $2, 8, 8; bfe.u32 s2, $2, 16, 8; bfe.u32 s3, $2, 24, 8;
            bfe.u32 z0, $3, 0, 8; bfe.u32 z1, $3, 8, 8; bfe.u32 z2, $3, 16, 8; bfe.u32 z3, $3, 24, 8;
            mad.lo.u32 c0, c0, s0, z0; mad.lo.u32 c1, c1, s1, z1;
            mad.lo.u32 c2, c2, s2, z2; mad.lo.u32 c3, c3, s3, z3;
            prmt.b32 c0, c0, c1, 0x0040; prmt.b32 c2, c2, c3, 0x0040; prmt.b32 $0, c0, c2, 0x5410;
            }""",
            "=r,r,r,r", [code, step, zero], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        code = code * step + zero
    return code


@triton.jit
def _by_rows(code, step, zero, ASM: tl.constexpr):
    """The same where four neighbours share a channel: no product carries into the next byte, and no sum may."""
    if ASM == "ptx":
        code = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, x, a, z;
            and.b32 s, $2, 255; mul.lo.u32 x, $1, s;
            and.b32 a, x, 0x7f7f7f7f; and.b32 z, $3, 0x7f7f7f7f; add.u32 a, a, z;
            xor.b32 x, x, $3; and.b32 x, x, 0x80808080; xor.b32 $0, a, x;
            }""",
            "=r,r,r,r", [code, step, zero], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        code = code * step + zero
    return code
