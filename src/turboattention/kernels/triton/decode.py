"""Attention of few query rows over packed pages, sinks and INT8 tail rows, in splits of a sequence.

Operands are transposed, as in `products`: query rows are columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_blocks import fold_rows, over_pages
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS
from .products import halves_of_queries
from .visibility import visible_range
from .widths import K_NUMBERS, V_NUMBERS, pair_of


@triton.jit(do_not_specialize=["table_stride", "sink_blocks", "width", "window", "mean_from_block", "mask_keys"])
def decode(
    q_ptr, unit_ptr, mean_ptr, ordered_q_ptr, ordered_unit_ptr, first_ptr, valid_ptr, lengths_ptr,
    table_ptr, counts_ptr, table_stride, blank_ptr, sink_blocks, sink_page_offsets_ptr, page_offsets_ptr,
    k8_ptr, v8_ptr, ks_ptr, vs_ptr, start_ptr, width,
    acc_ptr, row_max_ptr, row_sum_ptr,
    mask_ptr, mask_b, mask_h, mask_q, mask_k, mask_keys,
    kv_heads, group, queries, tiles, window, mean_from_block, cap, threshold,
    D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, V_WIDE: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
    SINKS: tl.constexpr, OPEN: tl.constexpr, BY_TOKEN: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr,
    ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    MEAN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (splits, KV heads x tiles of R rows, sequences).

    Results, unnormalized: acc float32 [B, Hkv, tiles, splits, R, V_WIDE] (not written if a split sees
    no keys), row_max (a logit; -inf if no key is visible) and row_sum (in units of 1/127) [B, Hkv, tiles, splits, R].
    ordered_q, ordered_unit: queries for compressed pages if their channels are reordered, or None.
    PAIRS: bit mask of the heads' widths (`page_offsets.pairs_mask`); 0: no compressed pages.
    """
    splits = tl.num_programs(0)
    split = tl.program_id(0)
    tile = tl.program_id(1) % tiles
    b = tl.program_id(2)
    head_ptr = page_offsets_ptr + tl.program_id(1) // tiles * OFFSETS
    sink_head_ptr = sink_page_offsets_ptr + tl.program_id(1) // tiles * OFFSETS
    h = tl.load(head_ptr)
    first = tl.load(first_ptr + b).to(tl.int32)
    valid = tl.load(valid_ptr + b).to(tl.int32)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    rows = queries * group
    row = tile * R + tl.arange(0, R)
    begin, end = visible_range(row, group, first, valid, length, window, CAUSAL, WINDOW)
    low = tl.min(tl.where(end > begin, begin, length), 0) // 64
    high = tl.cdiv(tl.max(end, 0), 64)
    each_split = tl.maximum(tl.cdiv(high - low, splits), 1)
    low = low + split * each_split
    high = tl.minimum(high, low + each_split)
    base = (b * kv_heads + h).to(tl.int64)
    # 32 bits, since these scalars stay in registers to the end.
    partial = (((b * kv_heads + h) * tiles + tile) * splits + split) * R
    lane = tl.arange(0, R)
    if low >= high:
        tl.store(row_max_ptr + partial + lane, tl.full((R,), float("-inf"), tl.float32))
        tl.store(row_sum_ptr + partial + lane, tl.zeros((R,), tl.float32))
    else:
        of_head = base * group * queries
        at = row % group * queries + row // group
        mean = tl.zeros((R,), tl.float32)
        if MEAN:
            mean = tl.load(mean_ptr + of_head + at, mask=row < rows, other=0.0)
        mask_row = tl.minimum(row, rows - 1)
        mask = (mask_ptr + b.to(tl.int64) * mask_b, mask_row, h * group, group, mask_h, mask_q, mask_k, mask_keys)
        visible = (begin, end, mask)
        acc = tl.zeros((V_WIDE, R), tl.float32)
        row_sum = tl.zeros((R,), tl.float32)
        row_max = tl.full((R,), float("-inf"), tl.float32)
        # Tail rows first, compressed pages last: registers that only tail rows need are then free in the page loop.
        if OPEN:
            start = tl.load(start_ptr + b).to(tl.int32)
            origin, used = base * width - start, tl.minimum(length, start + width)
            d = tl.arange(0, WIDE)[:, None]
            q = tl.load(q_ptr + of_head * D + (at[None, :] * D + d), mask=(row < rows)[None, :] & (d < D), other=0)
            unit = tl.load(unit_ptr + of_head + at, mask=row < rows, other=1.0)
            for block in tl.range(tl.maximum(low, start // 64), high, num_stages=1):
                acc, row_sum, row_max = fold_rows(
                    acc, row_sum, row_max, (k8_ptr, v8_ptr, ks_ptr, vs_ptr), origin + (block * 64 + tl.arange(0, 64)),
                    block, used, q, unit, mean, mean_from_block, visible, cap, threshold,
                    WIDE, D, V_WIDE, DV, FORM, CUT, ROW, CAP, MASK, False,
                )  # fmt: skip
        if SINKS or PAIRS > 0:
            count = tl.minimum(tl.load(counts_ptr + b).to(tl.int32), high)
            table_ptr += b.to(tl.int64) * table_stride
        if SINKS:
            q_first, q_second = halves_of_queries(q_ptr + of_head * D, at, row < rows, WIDE, D)
            unit = tl.load(unit_ptr + of_head + at, mask=row < rows, other=1.0)
            acc, row_sum, row_max = over_pages(
                acc, row_sum, row_max, table_ptr, blank_ptr, None, low, tl.minimum(count, sink_blocks), sink_head_ptr,
                (q_first, q_second, unit, mean, mean_from_block), visible, cap, threshold,
                WIDE, D, V_WIDE, DV, 8, 8, BY_TOKEN, FORM, CUT, ROW, WINDOW, CAP, MASK, ASM, 1, False,
            )  # fmt: skip
        if PAIRS > 0:
            of_pages, units = q_ptr, unit_ptr
            if ordered_q_ptr is not None:
                of_pages, units = ordered_q_ptr, ordered_unit_ptr
            q_first, q_second = halves_of_queries(of_pages + of_head * D, at, row < rows, WIDE, D)
            unit = tl.load(units + of_head + at, mask=row < rows, other=1.0)
            rows_seen = (q_first, q_second, unit, mean, mean_from_block)
            for K_BITS in tl.static_range(K_NUMBERS):
                for V_BITS in tl.static_range(V_NUMBERS):
                    if PAIRS & pair_of(K_BITS, V_BITS):
                        last = count
                        if pair_of(K_BITS, V_BITS) != PAIRS:  # no pages of another pair
                            own = (tl.load(head_ptr + OF_KEYS) == K_BITS) & (tl.load(head_ptr + OF_VALUES) == V_BITS)
                            last = tl.where(own, count, 0)
                        acc, row_sum, row_max = over_pages(
                            acc, row_sum, row_max, table_ptr, blank_ptr, None, tl.maximum(low, sink_blocks), last,
                            head_ptr, rows_seen, visible, cap, threshold, WIDE, D, V_WIDE, DV, K_BITS, V_BITS, BY_TOKEN,
                            FORM, CUT, ROW, WINDOW, CAP, MASK, ASM, None, False,
                        )  # fmt: skip
        acc_ptr += partial.to(tl.int64) * V_WIDE
        tl.store(acc_ptr + (lane[None, :] * V_WIDE + tl.arange(0, V_WIDE)[:, None]), acc)
        tl.store(row_max_ptr + partial + lane, row_max)
        tl.store(row_sum_ptr + partial + lane, row_sum)
