"""Attention of few query rows over pages that a server manages, in splits of a sequence, as in `decode`.

This kernel computes sequences of at most `most` rows (tokens times query heads per KV head); `paged_prefill` computes
the others. `combine` reduces the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_blocks import fold_rows, over_pages
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS
from .products import halves_of_queries
from .ragged import span_of, tail_rows_of
from .widths import K_NUMBERS, V_NUMBERS, pair_of


@triton.jit(do_not_specialize=["table_stride", "ring", "room", "tokens", "most", "window"])
def paged_decode(
    q_ptr, unit_ptr, mean_ptr, starts, lengths, tail_slots, table, table_stride, pages, page_stride, page_offsets_ptr,
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
    # 32 bits, since these scalars stay in registers to the end.
    partial = (((b * kv_heads + h) * tiles + tile) * splits + split) * R
    lane = tl.arange(0, R)
    if (begin >= end) & (tile * R < rows):
        tl.store(row_max_ptr + partial + lane, tl.full((R,), float("-inf"), tl.float32))
        tl.store(row_sum_ptr + partial + lane, tl.zeros((R,), tl.float32))
    if (begin < end) & (tile * R < rows):
        base = (h * group).to(tl.int64) * tokens + start
        at = row % group * tokens + row // group  # a KV head has less than 2^31 bytes of queries
        unit = tl.load(unit_ptr + base + at, mask=there, other=1.0)
        mean = tl.zeros_like(unit)
        if MEAN:
            mean = tl.load(mean_ptr + base + at, mask=there, other=0.0)
        q_ptr += base * D
        acc = tl.zeros((WIDE, R), tl.float32)
        row_sum = tl.zeros((R,), tl.float32)
        row_max = tl.full((R,), float("-inf"), tl.float32)
        # Tail rows first: registers that only they need are then free in the page loop.
        d = tl.arange(0, WIDE)[:, None]
        q = tl.load(q_ptr + (at[None, :] * D + d), mask=there[None, :] & (d < D), other=0)
        oldest = tl.min(tl.where(there, position, length), 0) // 64
        for block in tl.range(tl.maximum(begin, oldest), end, num_stages=1):
            origin = tail_rows_of(tail_slots, b, h, kv_heads, start, block, before // 64, ring, room, RING)
            acc, row_sum, row_max = fold_rows(
                acc, row_sum, row_max, (k8, v8, k_scales, v_scales), origin + tl.arange(0, 64), block, length, q, unit,
                mean, 0, (tl.maximum(sees, own), tl.where(there, position + 1, 0)), cap, threshold,
                WIDE, D, WIDE, D, FORM, CUT, ROW, CAP, "", True,
            )  # fmt: skip
        q_first, q_second = halves_of_queries(q_ptr, at, there, WIDE, D)
        for K_BITS in tl.static_range(K_NUMBERS):
            for V_BITS in tl.static_range(V_NUMBERS):
                if PAIRS & pair_of(K_BITS, V_BITS):
                    last = tl.minimum(end, high - 1)
                    if pair_of(K_BITS, V_BITS) != PAIRS:  # no pages of another pair
                        own_pair = (tl.load(head_ptr + OF_KEYS) == K_BITS) & (tl.load(head_ptr + OF_VALUES) == V_BITS)
                        last = tl.where(own_pair, last, 0)
                    acc, row_sum, row_max = over_pages(
                        acc, row_sum, row_max, table + b.to(tl.int64) * table_stride, pages, page_stride,
                        begin, last, head_ptr, (q_first, q_second, unit, mean, 0),
                        (sees, tl.where(there, own, 0)), cap, threshold,
                        WIDE, D, WIDE, D, K_BITS, V_BITS, BY_TOKEN, FORM, CUT, ROW, WINDOW, CAP, "", ASM, None, True,
                    )  # fmt: skip
        acc_ptr += partial.to(tl.int64) * WIDE
        tl.store(acc_ptr + (lane[None, :] * WIDE + tl.arange(0, WIDE)[:, None]), acc)
        tl.store(row_max_ptr + partial + lane, row_max)
        tl.store(row_sum_ptr + partial + lane, row_sum)
