"""Attention of few query rows over pages that a server manages, in splits of a sequence, as in `decode`.

A sequence is here where it has at most `most` rows (tokens times query heads of a KV head); `paged_prefill` takes
the others. `combine` brings the splits together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .metadata import key_metadata, scales_of, value_metadata
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS, section_offsets
from .products import first_half, key_channels, key_products, value_products
from .ragged import span_of, tail_rows_of
from .softmax import rescaled
from .stored import weigh_stored


@triton.jit
def _over_pages(
    acc, row_sum, row_max, table, pages, page_stride, begin, end, head_ptr, queries, sees, sees_end, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BY_TOKEN: tl.constexpr,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Folds pages `begin` to `end` in. Only a window lets a row see a part of a page."""
    q_first, q_second, is_high, unit, mean = queries
    k_offsets, v_offsets = section_offsets(head_ptr, D)
    t = tl.arange(0, 64)
    # Loaded a block ahead: or loads of pages could not be.
    ahead = tl.load(table + begin, mask=begin < end, other=0).to(tl.int64)
    page = tl.multiple_of(pages + ahead * page_stride, 16)
    of_keys = key_metadata(page, k_offsets, WIDE, D, K_BITS, BY_TOKEN)
    of_values = value_metadata(page, v_offsets, WIDE, D, V_BITS, BY_TOKEN)
    for block in tl.range(begin, end):
        page = tl.multiple_of(pages + ahead * page_stride, 16)
        ahead = tl.load(table + tl.minimum(block + 1, end - 1)).to(tl.int64)
        following = tl.multiple_of(pages + ahead * page_stride, 16)
        next_of_keys = key_metadata(following, k_offsets, WIDE, D, K_BITS, BY_TOKEN)
        next_of_values = value_metadata(following, v_offsets, WIDE, D, V_BITS, BY_TOKEN)
        s = key_products(page, k_offsets, of_keys, q_first, q_second, is_high, WIDE, D, K_BITS, ASM)
        s = s.to(tl.float32) * scales_of(of_keys[4], of_keys[5])[:, None]
        v_scale = scales_of(of_values[2], of_values[3])
        p, block_sum, block_max, largest = weigh_stored(
            s, unit, mean, block * 64 + t, v_scale, sees, sees_end, cap, threshold, FORM, CUT, ROW, True, WINDOW, CAP, 0
        )
        o = value_products(page, v_offsets, of_values, p, WIDE, D, V_BITS, ASM)
        row_max, rescale, each = rescaled(row_max, block_max)
        row_sum = row_sum * rescale + block_sum * each
        acc = tl.fma(o, (each * largest)[None, :], acc * rescale[None, :])
        of_keys = next_of_keys
        of_values = next_of_values
    return acc, row_sum, row_max


@triton.jit
def _over_rows(
    acc, row_sum, row_max, rows, block, length, q, unit, mean, sees, sees_end, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Folds one open block in. rows: (k8, v8, their scales, the row of its token 0); q int8 [WIDE, R]."""
    k8, v8, k_scales, v_scales, origin = rows
    t = tl.arange(0, 64)
    d = tl.arange(0, WIDE)
    key = block * 64 + t
    there = key < length
    at = origin + t
    inside = there[:, None] & (d < D)[None, :]
    k = tl.load(k8 + at[:, None] * D + d[None, :], mask=inside, other=0)
    s = tl.dot(k, q, out_dtype=tl.int32).to(tl.float32)
    s *= tl.load(k_scales + at, mask=there, other=0.0)[:, None]
    v_scale = tl.load(v_scales + at, mask=there, other=0.0)
    p, block_sum, block_max, largest = weigh_stored(
        s, unit, mean, key, v_scale, sees, sees_end, cap, threshold, FORM, CUT, ROW, True, True, CAP, 0
    )
    v = tl.load(v8 + at[:, None] * D + d[None, :], mask=inside, other=0)
    o = tl.dot(tl.trans(v), p.to(tl.int8), out_dtype=tl.int32).to(tl.float32)
    row_max, rescale, each = rescaled(row_max, block_max)
    row_sum = row_sum * rescale + block_sum * each
    return tl.fma(o, (each * largest)[None, :], acc * rescale[None, :]), row_sum, row_max


@triton.jit(do_not_specialize=["table_stride", "ring", "room", "tokens", "most", "window"])
def paged_decode(
    q_ptr, unit_ptr, mean_ptr, starts, lengths, slots, table, table_stride, pages, page_stride, page_offsets_ptr,
    k8, v8, k_scales, v_scales, ring, room, acc_ptr, row_max_ptr, row_sum_ptr,
    kv_heads, group, tokens, most, tiles, window, cap, threshold,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
    BY_TOKEN: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, MEAN: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (splits, KV heads x tiles of R rows, sequences). PAIRS: as in `decode`.

    q int8 [Hkv, g, T, D], unit and mean float32 [Hkv, g, T]. Results as those of `decode`: acc
    [B, Hkv, tiles, splits, R, WIDE], row_max and row_sum [B, Hkv, tiles, splits, R], of sequences that are here.
    """
    splits = tl.num_programs(0)
    split = tl.program_id(0)
    tile = tl.program_id(1) % tiles
    b = tl.program_id(2)
    head_ptr = page_offsets_ptr + tl.program_id(1) // tiles * OFFSETS
    h = tl.load(head_ptr)
    start, count, length = span_of(starts, lengths, b)
    rows = tl.where(count * group <= most, count * group, 0)
    row = tile * R + tl.arange(0, R)
    there = row < rows
    before = length - count
    position = before + row // group
    own = position // 64 * 64
    sees = tl.zeros_like(row)
    if WINDOW:
        sees = tl.maximum(position - window + 1, 0)
    high = tl.max(tl.where(there, position, -1), 0) // 64 + 1
    low = tl.min(tl.where(there, sees, length), 0) // 64
    each_split = tl.maximum(tl.cdiv(high - low, splits), 1)
    begin = low + split * each_split
    end = tl.minimum(high, begin + each_split)
    # A corner of 64 bits, and offsets of 32: what stays in registers to the end.
    partial = (((b * kv_heads + h).to(tl.int64) * tiles + tile) * splits + split) * R
    row_max_ptr += partial
    row_sum_ptr += partial
    lane = tl.arange(0, R)
    if (begin >= end) & (tile * R < rows):
        tl.store(row_max_ptr + lane, tl.full((R,), float("-inf"), tl.float32))
        tl.store(row_sum_ptr + lane, tl.zeros((R,), tl.float32))
    if (begin < end) & (tile * R < rows):
        at = (h * group + row % group).to(tl.int64) * tokens + start + row // group
        unit = tl.load(unit_ptr + at, mask=there, other=1.0)
        mean = tl.zeros_like(unit)
        if MEAN:
            mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        acc = tl.zeros((WIDE, R), tl.float32)
        row_sum = tl.zeros((R,), tl.float32)
        row_max = tl.full((R,), float("-inf"), tl.float32)
        # Open blocks first: what they alone need is then not held over the pages.
        d = tl.arange(0, WIDE)[:, None]
        q = tl.load(q_ptr + at[None, :] * D + d, mask=there[None, :] & (d < D), other=0)
        oldest = tl.min(tl.where(there, position, length), 0) // 64
        for block in tl.range(tl.maximum(begin, oldest), end, num_stages=1):
            origin = tail_rows_of(slots, b, h, kv_heads, start, block, before // 64, ring, room, RING)
            acc, row_sum, row_max = _over_rows(
                acc, row_sum, row_max, (k8, v8, k_scales, v_scales, origin), block, length, q, unit, mean,
                tl.maximum(sees, own), tl.where(there, position + 1, 0), cap, threshold, WIDE, D, FORM, CUT, ROW, CAP,
            )  # fmt: skip
        channel = key_channels(WIDE, D)[:, None]
        column = tl.arange(0, 2 * R)
        q_row = tile * R + column // 2
        q_at = ((h * group + q_row % group).to(tl.int64) * tokens + start + q_row // group)[None, :] * D + channel
        q_there = (q_row < rows)[None, :]
        q_first = tl.load(q_ptr + q_at, mask=q_there & (channel < D), other=0).to(tl.int32)
        q_at += first_half(D)
        q_second = tl.load(q_ptr + q_at, mask=q_there & (channel + first_half(D) < D), other=0).to(tl.int32)
        is_high = (column % 2 == 1)[None, :]
        for K_BITS in tl.static_range(2, 9):
            for V_BITS in tl.static_range(2, 9):
                if PAIRS >> (7 * (K_BITS - 2) + V_BITS - 2) & 1:
                    last = tl.minimum(end, high - 1)
                    if PAIRS != 1 << (7 * (K_BITS - 2) + V_BITS - 2):  # another pair's loop has none
                        own_pair = (tl.load(head_ptr + OF_KEYS) == K_BITS) & (tl.load(head_ptr + OF_VALUES) == V_BITS)
                        last = tl.where(own_pair, last, 0)
                    acc, row_sum, row_max = _over_pages(
                        acc, row_sum, row_max, table + b.to(tl.int64) * table_stride, pages, page_stride,
                        begin, last, head_ptr, (q_first, q_second, is_high, unit, mean),
                        sees, tl.where(there, own, 0), cap, threshold,
                        WIDE, D, K_BITS, V_BITS, BY_TOKEN, FORM, CUT, ROW, WINDOW, CAP, ASM,
                    )  # fmt: skip
        tl.store(acc_ptr + partial * WIDE + (lane[None, :] * WIDE + tl.arange(0, WIDE)[:, None]), acc)
        tl.store(row_max_ptr + lane, row_max)
        tl.store(row_sum_ptr + lane, row_sum)
