"""Fields of packed bytes, four in a 32-bit lane, and how they are put side by side in registers.

Bits come apart by a shift and a mask (flashq.packing). Where ASM is "ptx" a lane takes two instructions, which
Triton's own arithmetic on bytes does not; the results are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lanes(b, SHIFT: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    """`(b >> SHIFT) & MASK` of bytes."""
    if ASM == "ptx":
        if SHIFT == 0:
            b = tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {MASK * 0x01010101};", "=r,r", [b], dtype=tl.uint8, is_pure=True, pack=4
            )
        else:
            b = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK * 0x01010101}; }}",
                "=r,r", [b], dtype=tl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        b = (b >> SHIFT) & MASK
    return b


@triton.jit
def field(b, F: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The F-th codes of a plane's bytes; of three bits, the lower two."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    return _lanes(b, WIDTH * F, 15 if BITS == 4 else 3, ASM)


@triton.jit
def third(b, F: tl.constexpr, ASM: tl.constexpr):
    """`((b >> F) & 1) << 2`: the F-th bits of the plane of highest ones, as what they add to three-bit codes."""
    if ASM == "ptx":
        b = tl.inline_asm_elementwise(
            f"{{ .reg .b32 u; shf.l.wrap.b32 u, $1, $1, {(34 - F) % 32}; and.b32 $0, u, 0x04040404; }}",
            "=r,r", [b], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b = ((b >> F) & 1) << 2
    return b


@triton.jit
def shifted(b, by, ASM: tl.constexpr):
    """b >> by for bytes by = 0 or 1, each with its own. Of the result, bits 0, 2, 4 and 6 are used: what a
    neighbour shifts in, bit 7, is not among them."""
    if ASM == "ptx":
        # A select by bytes: which bytes share a lane is the compiler's choice, and they may differ in `by`.
        b = tl.inline_asm_elementwise(
            """{
            .reg .b32 m, t;
            mul.lo.u32 m, $2, 255; shr.u32 t, $1, 1;
            xor.b32 t, t, $1; and.b32 t, t, m; xor.b32 $0, $1, t;
            }""",
            "=r,r,r", [b, by], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b = b >> by
    return b


@triton.jit
def as_int8(b, ASM: tl.constexpr):
    """INT8 of the bytes that 8-bit pages hold, X8 + 128."""
    if ASM == "ptx":
        b = tl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", [b], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        b = b ^ 128
    return b.to(tl.int8, bitcast=True)


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
