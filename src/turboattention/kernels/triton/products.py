"""Integer products of packed pages as they lie, for few query rows.

All is transposed: tokens (then channels) are the rows of the products, query rows their columns, so that
packed codes are the first operand. `q . (code step + zero) = (q step) . code + q . zero`, and `q step` is split
into 128 high + low, which stand in neighbouring columns. V needs no step in the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import sum_of_levels
from .unpacking import bytes_of, code, field, interleave, signed, stack, words_at


@triton.jit
def key_products(
    page, place, held, q_low, q_high, is_high, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """INT8 products of 64 packed keys and queries, int32 [64, R]. q_low, q_high int32 [WIDE / 2, 2 R]: channels
    c % 8 < 4 and the others, every query twice; is_high: its second column; held: `metadata.key_metadata`."""
    HALF: tl.constexpr = WIDE // 2
    R: tl.constexpr = q_low.shape[1] // 2
    # Words of four channels: octets of lines [tokens][4 channels], and threads side by side take tokens.
    FIELD_TOKENS: tl.constexpr = 64 if BITS >= 4 else 32
    octet = tl.arange(0, HALF // 4)
    inside = None if D == WIDE else (octet < D // 8)[None, :]
    words = words_at(page, place[0]) + (octet * (16 * BITS))[None, :]
    at = words + tl.arange(0, FIELD_TOKENS)[:, None]
    w = tl.load(at, mask=inside)
    if BITS == 8:
        low = bytes_of(signed(w), ASM)
        high = bytes_of(signed(tl.load(at + 64, mask=inside)), ASM)
        w_low = tl.where(is_high, 0, q_low).to(tl.int8)
        w_high = tl.where(is_high, 0, q_high).to(tl.int8)
        s = tl.dot(low, w_low, out_dtype=tl.int32)
        s = tl.dot(high, w_high, acc=s, out_dtype=tl.int32)
    else:
        if BITS == 4:
            low = bytes_of(field(w, 0, BITS), ASM)
            high = bytes_of(field(w, 1, BITS), ASM)
        else:
            thirds = w
            if BITS == 3:
                # Tokens 16 apart share a byte: its bits are shifted so that those of a field stand side by side.
                thirds = tl.load(words + 32 + tl.arange(0, 16)[:, None], mask=inside)
                thirds = stack(thirds, thirds >> 1, True)
            low = stack(bytes_of(code(w, thirds, 0, BITS), ASM), bytes_of(code(w, thirds, 1, BITS), ASM), True)
            high = stack(bytes_of(code(w, thirds, 2, BITS), ASM), bytes_of(code(w, thirds, 3, BITS), ASM), True)
        zero_low = held[1].to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        zero_high = held[3].to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        w_low = q_low * held[0].to(tl.int32)[:, None]
        w_high = q_high * held[2].to(tl.int32)[:, None]
        top_low = (w_low + 64) >> 7
        top_high = (w_high + 64) >> 7
        w_low = tl.where(is_high, top_low, w_low - top_low * 128).to(tl.int8)
        w_high = tl.where(is_high, top_high, w_high - top_high * 128).to(tl.int8)
        offset = tl.sum(tl.where(is_high, 0, q_low * zero_low + q_high * zero_high), 0)
        s = tl.dot(low, w_low, out_dtype=tl.int32)
        s = tl.dot(high, w_high, acc=s, out_dtype=tl.int32)
        s = s * tl.where(is_high, 128, 1) + offset[None, :]
    return tl.sum(tl.reshape(s, (64, R, 2)), 2)


@triton.jit
def value_products(page, place, held, p, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Packed values times weights (`round_levels` [64, R]): float32 [WIDE, R]. held: `metadata.value_metadata`."""
    d = tl.arange(0, WIDE)
    inside = None if D == WIDE else (d < D)[:, None]
    # Words of four tokens: octets of lines [quads of tokens][8 channels].
    QUADS: tl.constexpr = 2 * BITS if BITS >= 4 else 4
    quad = tl.arange(0, QUADS)[None, :]
    words = words_at(page, place[0]) + (d // 8 * (16 * BITS) + d % 8)[:, None]
    w = tl.load(words + quad * 8, mask=inside)
    weights = p.to(tl.int8)
    if BITS < 4:
        weights = _by_pairs_of_fields(weights)
    if BITS == 8:
        result = tl.dot(bytes_of(signed(w), ASM), weights, out_dtype=tl.int32).to(tl.float32)
    else:
        if BITS == 4:
            v = stack(bytes_of(field(w, 0, BITS), ASM), bytes_of(field(w, 1, BITS), ASM), False)
        else:
            thirds = w
            if BITS == 3:
                # Half the quads a line: shifted by one for the other half.
                thirds = tl.load(words + 32 + tl.arange(0, 2)[None, :] * 8, mask=inside)
                thirds = stack(thirds, thirds >> 1, False)
            v = stack(bytes_of(interleave(code(w, thirds, 0, BITS), code(w, thirds, 1, BITS)), ASM),
                      bytes_of(interleave(code(w, thirds, 2, BITS), code(w, thirds, 3, BITS)), ASM),
                      False)  # fmt: skip
        o = tl.dot(v, weights, out_dtype=tl.int32)
        step = held[0].to(tl.float32)[:, None]
        zero = held[1].to(tl.int8, bitcast=True).to(tl.float32)[:, None]
        result = tl.fma(o.to(tl.float32), step, zero * sum_of_levels(p, 0)[None, :])
    return result


@triton.jit
def _by_pairs_of_fields(p):
    """[64, R], tokens as fields of 16 one behind the other -> the words of two fields in turns, as `interleave` leaves
    them: fields are then in registers of a thread, and no thread has to give others what it unpacked."""
    R: tl.constexpr = p.shape[1]
    return tl.reshape(tl.permute(tl.reshape(p, (2, 2, 4, 4, R)), (0, 2, 1, 3, 4)), (64, R))
