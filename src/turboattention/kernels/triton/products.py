"""Integer products of packed pages as they lie, for few query rows.

All is transposed: tokens (then channels) are the rows of the products, query rows their columns, so that
packed codes are the first operand. `q . (code step + zero) = (q step) . code + q . zero`, and `q step` is split
into 128 high + low, which stand in neighbouring columns. V needs no step in the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import sum_of_levels
from .unpacking import as_int8, field, shifted, stack, third


@triton.jit
def key_products(page, place, q_low, q_high, is_high, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """INT8 products of 64 packed keys and queries, int32 [64, R]. q_low, q_high int32 [WIDE / 2, 2 R]: channels
    c % 8 < 4 and the others, every query twice; is_high: its second column."""
    HALF: tl.constexpr = WIDE // 2
    R: tl.constexpr = q_low.shape[1] // 2
    half = tl.arange(0, HALF)
    channel = half // 4 * 8 + half % 4
    inside = None if D == WIDE else (channel < D)[None, :]
    FIELD_TOKENS: tl.constexpr = 64 if BITS >= 4 else 32
    u = tl.arange(0, FIELD_TOKENS)
    codes = page + place[0]
    at = (half // 4 * (64 * BITS) + half % 4)[None, :] + (u * 4)[:, None]
    b = tl.load(codes + at, mask=inside)
    if BITS == 8:
        low = as_int8(b, ASM)
        high = as_int8(tl.load(codes + 256 + at, mask=inside), ASM)
        w_low = tl.where(is_high, 0, q_low).to(tl.int8)
        w_high = tl.where(is_high, 0, q_high).to(tl.int8)
        s = tl.dot(low, w_low, out_dtype=tl.int32)
        s = tl.dot(high, w_high, acc=s, out_dtype=tl.int32)
    else:
        if BITS == 4:
            low = field(b, 0, BITS, ASM)
            high = field(b, 1, BITS, ASM)
        else:
            low = stack(field(b, 0, BITS, ASM), field(b, 1, BITS, ASM), True)
            high = stack(field(b, 2, BITS, ASM), field(b, 3, BITS, ASM), True)
        column = None if D == WIDE else channel < D
        steps = page + place[1] + channel
        zeros = page + place[2] + channel
        step_low = tl.load(steps, mask=column).to(tl.int32)[:, None]
        step_high = tl.load(steps + 4, mask=column).to(tl.int32)[:, None]
        zero_low = tl.load(zeros, mask=column).to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        zero_high = tl.load(zeros + 4, mask=column).to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        w_low = q_low * step_low
        w_high = q_high * step_high
        top_low = (w_low + 64) >> 7
        top_high = (w_high + 64) >> 7
        w_low = tl.where(is_high, top_low, w_low - top_low * 128).to(tl.int8)
        w_high = tl.where(is_high, top_high, w_high - top_high * 128).to(tl.int8)
        offset = tl.sum(tl.where(is_high, 0, q_low * zero_low + q_high * zero_high), 0)
        s = tl.dot(low.to(tl.int8, bitcast=True), w_low, out_dtype=tl.int32)
        s = tl.dot(high.to(tl.int8, bitcast=True), w_high, acc=s, out_dtype=tl.int32)
        if BITS == 3:
            # Products of their own: to join the planes first costs twice the instructions.
            line = (half // 4 * (64 * BITS) + 128 + half % 4)[None, :] + (tl.arange(0, 16) * 4)[:, None]
            b = tl.load(codes + line, mask=inside)
            low = stack(stack(third(b, 0, ASM), third(b, 1, ASM), True),
                        stack(third(b, 2, ASM), third(b, 3, ASM), True), True)  # fmt: skip
            high = stack(stack(third(b, 4, ASM), third(b, 5, ASM), True),
                         stack(third(b, 6, ASM), third(b, 7, ASM), True), True)  # fmt: skip
            s = tl.dot(low.to(tl.int8, bitcast=True), w_low, acc=s, out_dtype=tl.int32)
            s = tl.dot(high.to(tl.int8, bitcast=True), w_high, acc=s, out_dtype=tl.int32)
        s = s * tl.where(is_high, 128, 1) + offset[None, :]
    return tl.sum(tl.reshape(s, (64, R, 2)), 2)


@triton.jit
def value_products(page, place, p, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Packed values times weights (`round_levels` [64, R]): float32 [WIDE, R]."""
    d = tl.arange(0, WIDE)
    inside = None if D == WIDE else (d < D)[:, None]
    FIELD_TOKENS: tl.constexpr = 8 * BITS if BITS == 8 or BITS == 4 else 16
    j = tl.arange(0, FIELD_TOKENS)
    codes = page + place[0]
    b = tl.load(codes + (d // 8 * (64 * BITS) + d % 8 * 4)[:, None] + (j // 4 * 32 + j % 4)[None, :], mask=inside)
    weights = p.to(tl.int8)
    if BITS == 8:
        result = tl.dot(as_int8(b, ASM), weights, out_dtype=tl.int32).to(tl.float32)
    else:
        v = stack(field(b, 0, BITS, ASM), field(b, 1, BITS, ASM), False)
        if BITS < 4:
            v = stack(v, stack(field(b, 2, BITS, ASM), field(b, 3, BITS, ASM), False), False)
        o = tl.dot(v.to(tl.int8, bitcast=True), weights, out_dtype=tl.int32)
        if BITS == 3:
            # Half the tokens a byte line: shifted by one for the other half.
            line = (d // 8 * (64 * BITS) + 128 + d % 8 * 4)[:, None] + (j // 4 % 2 * 32 + j % 4)[None, :]
            by = tl.broadcast_to((j // 8).to(tl.uint8)[None, :], (WIDE, FIELD_TOKENS))
            b = shifted(tl.load(codes + line, mask=inside), by, ASM)
            v = stack(stack(third(b, 0, ASM), third(b, 2, ASM), False),
                      stack(third(b, 4, ASM), third(b, 6, ASM), False), False)  # fmt: skip
            o = tl.dot(v.to(tl.int8, bitcast=True), weights, acc=o, out_dtype=tl.int32)
        column = None if D == WIDE else d < D
        step = tl.load(page + place[1] + d, mask=column).to(tl.float32)[:, None]
        zero = tl.load(page + place[2] + d, mask=column).to(tl.int8, bitcast=True).to(tl.float32)[:, None]
        result = tl.fma(o.to(tl.float32), step, zero * sum_of_levels(p, 0)[None, :])
    return result
