"""Packed pages back to INT8 in registers, as operands of products with many query rows.

Keys come with their channels in another order, in which queries are to come too (`halves`): channels c % 8 < 4 first,
then the others, as fields of a byte hold them. Where ASM is "ptx" four bytes share an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpacking import as_int8, stack


@triton.jit
def halves(WIDE: tl.constexpr):
    """The channel at each place of keys and queries, int32 [WIDE]."""
    place = tl.arange(0, WIDE)
    half = place % (WIDE // 2)
    return half // 4 * 8 + half % 4 + place // (WIDE // 2) * 4


@triton.jit
def page_keys(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A page's keys, int8 [64, WIDE], zeros past D; `place`: of K, as in `operands.places_of`."""
    low = _half_of_keys(page, place, 0, WIDE, D, BITS, ASM)
    high = _half_of_keys(page, place, 1, WIDE, D, BITS, ASM)
    return stack(low, high, False)


@triton.jit
def _half_of_keys(
    page, place, HIGH: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):
    t = tl.arange(0, 64)[:, None]
    half = tl.arange(0, WIDE // 2)[None, :]
    channel = half // 4 * 8 + half % 4 + 4 * HIGH
    inside = channel < D
    line = page + place[0] + (half // 4 * (64 * BITS) + half % 4)
    if BITS == 8:
        return as_int8(tl.load(line + 256 * HIGH + t * 4, mask=inside, other=128), ASM)
    if BITS == 4:
        code = _bits(tl.load(line + t * 4, mask=inside, other=0), t * 0 + 4 * HIGH, 15, 0, ASM)
    else:
        code = _bits(tl.load(line + t % 32 * 4, mask=inside, other=0), t // 32 * 2 + 4 * HIGH, 3, 0, ASM)
        if BITS == 3:
            third = tl.load(line + 128 + t % 16 * 4, mask=inside, other=0)
            code |= _bits(third, t // 16 + 4 * HIGH, 1, 2, ASM)
    step = tl.load(page + place[1] + channel, mask=inside, other=0)
    zero = tl.load(page + place[2] + channel, mask=inside, other=0)
    return _by_channels(code, step, zero, ASM).to(tl.int8, bitcast=True)


@triton.jit
def page_values(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A page's values, int8 [WIDE, 64], zeros past D; `place`: of V, likewise."""
    d = tl.arange(0, WIDE)[:, None]
    t = tl.arange(0, 64)[None, :]
    inside = d < D
    line = page + place[0] + (d // 8 * (64 * BITS) + d % 8 * 4)
    if BITS == 8:
        return as_int8(tl.load(line + (t // 4 * 32 + t % 4), mask=inside, other=128), ASM)
    if BITS == 4:
        code = _bits(tl.load(line + (t % 32 // 4 * 32 + t % 4), mask=inside, other=0), t // 32 * 4, 15, 0, ASM)
    else:
        code = _bits(tl.load(line + (t % 16 // 4 * 32 + t % 4), mask=inside, other=0), t // 16 * 2, 3, 0, ASM)
        if BITS == 3:
            third = tl.load(line + 128 + (t // 4 % 2 * 32 + t % 4), mask=inside, other=0)
            code |= _bits(third, t // 8, 1, 2, ASM)
    step = tl.load(page + place[1] + d, mask=inside, other=0)
    zero = tl.load(page + place[2] + d, mask=inside, other=0)
    return _by_rows(code, step, zero, ASM).to(tl.int8, bitcast=True)


@triton.jit
def _bits(b, by, MASK: tl.constexpr, UP: tl.constexpr, ASM: tl.constexpr):
    """`((b >> by) & MASK) << UP` of bytes; `by` is the same for four neighbours."""
    by = by.to(tl.uint8)
    if ASM == "ptx":
        b = tl.inline_asm_elementwise(
            f"{{ .reg .b32 u; and.b32 u, $2, 7; shr.u32 u, $1, u; and.b32 u, u, {MASK * 0x01010101}; "
            f"shl.b32 $0, u, {UP}; }}",
            "=r,r,r", [b, by], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b = ((b >> by) & MASK) << UP
    return b


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
