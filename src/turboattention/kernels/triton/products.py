"""Integer products of packed pages with few query rows.

Products are transposed: tokens (for V channels) are rows and query rows are columns, so packed codes are the first
operand. `q . (code step + zero) = (q step) . code + q . zero`, where `q step` is split into `128 high + low`. For V,
steps are applied after the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import sum_of_levels
from .unpacking import bytes_of, code, field, interleave, signed, stack, words_at
from .widths import lower_plane, narrower, wider


@triton.constexpr_function
def first_half(head_dim):
    """Channels in the first of the two products over keys; with two widths, all of K's wider codes."""
    return (head_dim // 8 + 1) // 2 * 8


@triton.jit
def key_channels(WIDE: tl.constexpr, D: tl.constexpr):
    """Channel of each column of a product's first operand, int32 [WIDE / 2]: channels with c % 8 < 4 of half of the
    octets, then their other channels; D or more for padding. Add `first_half(D)` for the second product."""
    at = tl.arange(0, WIDE // 2)
    channel = at % (WIDE // 4) // 4 * 8 + at // (WIDE // 4) * 4 + at % 4
    if D < WIDE:
        channel = tl.where(channel < first_half(D), channel, D)
    return channel


@triton.jit
def halves_of_queries(q_ptr, at, there, WIDE: tl.constexpr, D: tl.constexpr):
    """INT8 rows `at` of q for `key_products`, zeros unless `there`."""
    channel = key_channels(WIDE, D)[:, None]
    row = q_ptr + (at[None, :] * D + channel)
    first = tl.load(row, mask=there[None, :] & (channel < D), other=0)
    second = tl.load(row + first_half(D), mask=there[None, :] & (channel + first_half(D) < D), other=0)
    return first.to(tl.int32), second.to(tl.int32)


@triton.jit
def key_products(
    page, offsets, held, q_first, q_second, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """INT8 products of 64 packed keys and R queries, int32 [64, R].

    q_first, q_second: int32 [WIDE / 2, R], channels as in `key_channels`. held: from `metadata.key_metadata`."""
    OCTETS: tl.constexpr = first_half(D) // 8
    FIRST: tl.constexpr = wider(BITS)
    SECOND: tl.constexpr = narrower(BITS)
    words = words_at(page, offsets[0])
    first = _key_codes(words, WIDE // 16, OCTETS, FIRST, ASM)
    second = _key_codes(words + OCTETS * (16 * FIRST), WIDE // 16, D // 8 - OCTETS, SECOND, ASM)
    if BITS == 8:
        s = tl.dot(first, q_first.to(tl.int8), out_dtype=tl.int32)
        s = tl.dot(second, q_second.to(tl.int8), acc=s, out_dtype=tl.int32)
    else:
        zero_first = held[1].to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        zero_second = held[3].to(tl.int8, bitcast=True).to(tl.int32)[:, None]
        offset = tl.sum(q_first * zero_first + q_second * zero_second, 0)
        high_first, low_first = _high_and_low(q_first * held[0].to(tl.int32)[:, None])
        high_second, low_second = _high_and_low(q_second * held[2].to(tl.int32)[:, None])
        R: tl.constexpr = q_first.shape[1]
        if R < 8:  # Both parts are columns of one product, which has eight at least.
            s = tl.dot(first, interleave(high_first, low_first), out_dtype=tl.int32)
            s = tl.dot(second, interleave(high_second, low_second), acc=s, out_dtype=tl.int32)
            high, low = tl.split(tl.reshape(s, (64, R, 2)))
            s = high * 128 + low + offset[None, :]
        else:
            s = tl.dot(first, high_first, out_dtype=tl.int32)
            s = tl.dot(second, high_second, acc=s, out_dtype=tl.int32) * 128 + offset[None, :]
            s = tl.dot(first, low_first, acc=s, out_dtype=tl.int32)
            s = tl.dot(second, low_second, acc=s, out_dtype=tl.int32)
    return s


@triton.jit
def _high_and_low(x):
    """x as `128 high + low`, both int8."""
    high = (x + 64) >> 7
    return high.to(tl.int8), (x - high * 128).to(tl.int8)


@triton.jit
def _key_codes(words, OCTETS: tl.constexpr, USED: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Codes of 64 tokens, int8 [64, 8 OCTETS], channels as in `key_channels`, from octets of lines [tokens][4 channels]
    at `words`. Columns of octets from USED on are undefined."""
    octet = tl.arange(0, OCTETS)
    inside = None if USED == OCTETS else (octet < USED)[None, :]
    # A word has four channels; adjacent threads load adjacent tokens.
    LOWER: tl.constexpr = lower_plane(BITS)
    FIELD_TOKENS: tl.constexpr = 64 if LOWER >= 4 else 16 * LOWER
    at = words + (octet * (16 * BITS))[None, :] + tl.arange(0, FIELD_TOKENS)[:, None]
    w = tl.load(at, mask=inside)
    bits = w
    if LOWER < BITS:
        bits = words + (octet * (16 * BITS))[None, :] + 16 * LOWER + tl.arange(0, 16)[:, None]
        # Tokens 16 apart share a byte; shift so that the bits of a field are adjacent.
        bits = tl.load(bits, mask=inside)
        bits = stack(bits, bits >> 1, True)
    if BITS == 8:
        low = bytes_of(signed(w), ASM)
        high = bytes_of(signed(tl.load(at + 64, mask=inside)), ASM)
    elif LOWER == 4:
        if LOWER < BITS:
            bits = stack(bits, bits >> 2, True)
        low = bytes_of(code(w, bits, 0, BITS), ASM)
        high = bytes_of(code(w, bits, 1, BITS), ASM)
    elif LOWER == 2:
        low = stack(bytes_of(code(w, bits, 0, BITS), ASM), bytes_of(code(w, bits, 1, BITS), ASM), True)
        high = stack(bytes_of(code(w, bits, 2, BITS), ASM), bytes_of(code(w, bits, 3, BITS), ASM), True)
    else:
        low = stack(_pair(w, 0, ASM), _pair(w, 2, ASM), True)
        high = stack(_pair(w, 4, ASM), _pair(w, 6, ASM), True)
    return stack(low, high, False)


@triton.jit
def _pair(w, F: tl.constexpr, ASM: tl.constexpr):
    """Two fields of single bits, stacked along rows."""
    return stack(bytes_of(field(w, F, 1), ASM), bytes_of(field(w, F + 1, 1), ASM), True)


@triton.jit
def value_products(page, offsets, held, p, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Packed values times weights p [64, R] (`round_levels`): float32 [WIDE, R].

    held: from `metadata.value_metadata`."""
    d = tl.arange(0, WIDE)
    inside = None if D == WIDE else (d < D)[:, None]
    # A word has four tokens of a channel; lines are [quads of tokens][8 channels].
    LOWER: tl.constexpr = lower_plane(BITS)
    QUADS: tl.constexpr = 2 * LOWER
    tl.static_assert(LOWER >= 2)
    quad = tl.arange(0, QUADS)[None, :]
    words = words_at(page, offsets[0]) + (d // 8 * (16 * BITS) + d % 8)[:, None]
    w = tl.load(words + quad * 8, mask=inside)
    weights = p.to(tl.int8)
    if LOWER < 4:
        weights = _by_pairs_of_fields(weights)
    if BITS == 8:
        result = tl.dot(bytes_of(signed(w), ASM), weights, out_dtype=tl.int32).to(tl.float32)
    else:
        bits = w
        if LOWER < BITS:
            # A word of highest bits serves all quads of a field that are two apart, each after a shift by one more.
            bits = tl.load(words + 16 * LOWER + tl.arange(0, 2)[None, :] * 8, mask=inside)
            bits = stack(bits, bits >> 1, False)
            if LOWER == 4:
                bits = stack(bits, bits >> 2, False)
        if LOWER == 4:
            v = stack(bytes_of(code(w, bits, 0, BITS), ASM), bytes_of(code(w, bits, 1, BITS), ASM), False)
        else:
            v = stack(bytes_of(interleave(code(w, bits, 0, BITS), code(w, bits, 1, BITS)), ASM),
                      bytes_of(interleave(code(w, bits, 2, BITS), code(w, bits, 3, BITS)), ASM),
                      False)  # fmt: skip
        o = tl.dot(v, weights, out_dtype=tl.int32)
        step = held[0].to(tl.float32)[:, None]
        zero = held[1].to(tl.int8, bitcast=True).to(tl.float32)[:, None]
        result = tl.fma(o.to(tl.float32), step, zero * sum_of_levels(p, 0)[None, :])
    return result


@triton.jit
def _by_pairs_of_fields(p):
    """Reorder the tokens of p [64, R] like codes after `interleave`, which alternates the words of two fields.

    Then all fields stay in the registers of the thread that unpacked them."""
    R: tl.constexpr = p.shape[1]
    return tl.reshape(tl.permute(tl.reshape(p, (2, 2, 4, 4, R)), (0, 2, 1, 3, 4)), (64, R))
