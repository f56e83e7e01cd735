"""Attention of many query rows over blocks of 64 INT8 keys and values, both products in integers.

K [64, D] and V^T [Dv, 64] of a block come from `unpacked_kv`. Rows of a KV head are counted as in `visibility`, so that
a program's rows are neighbouring tokens of all its query heads. Products with V are computed in two halves of its
channels, one after the other: this halves the registers of a product, and more programs are resident.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rotation import rotate_back
from .softmax import as_float, log_sum_exp, rescaled, weigh
from .unpacked_kv import by_value_columns
from .visibility import visible_range


@triton.jit
def _add_values(acc, p, rescale, each, rose, v_ptr, SLOW: tl.constexpr):
    """acc * rescale + each * (p V) for V^T [N, 64] at v_ptr, acc float32 [M, N]."""
    t = tl.arange(0, 64)
    d = tl.arange(0, acc.shape[1])
    v = tl.load(v_ptr + d[None, :] * 64 + t[:, None])
    o = as_float(tl.dot(p, v, out_dtype=tl.int32), SLOW)
    if rose > 0:  # otherwise all of `rescale` is 1
        acc = acc * rescale[:, None]
    return tl.fma(o, each[:, None], acc)


@triton.jit
def _fold_block(
    first, second, row_sum, row_max, q, unit, ordered, mean, mean_from_block, block, unpacked, visible, cap, threshold,
    WIDE: tl.constexpr, V_WIDE: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr,
    SEEN: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, MEAN: tl.constexpr, SLOW: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr = unpacked
    t = tl.arange(0, 64)
    d = tl.arange(0, WIDE)
    key = block * 64 + t
    at = block * tl.full((), 64 * WIDE, tl.int64)
    k = tl.load(k_ptr + at + t[None, :] * WIDE + d[:, None])
    if ordered is not None:
        in_order = (block >= ordered[2]) & (block < ordered[3])
        q = tl.where(in_order, ordered[0], q)
        unit = tl.where(in_order, ordered[1], unit)
    s = as_float(tl.dot(q, k, out_dtype=tl.int32), SLOW) * tl.load(k_scale_ptr + key)[None, :]
    if MEAN:
        mean = tl.where(block >= mean_from_block, mean, 0.0)
    levels = tl.load(v_level_ptr + key)
    p, block_sum, block_max, share = weigh(
        s, unit, mean, key, levels, visible, cap, threshold, FORM, CUT, ROW, SEEN, CAP, MASK, 1
    )
    rose = tl.max((block_max > row_max).to(tl.int32), 0) if SKIP else 1
    row_max, rescale, each = rescaled(row_max, block_max)
    row_sum = row_sum * rescale + block_sum * each
    each = each * tl.load(v_scale_ptr + block)
    if ROW:
        each *= share
    p = by_value_columns(p).to(tl.int8)
    v_ptr += block * tl.full((), 64 * V_WIDE, tl.int64)
    first = _add_values(first, p, rescale, each, rose, v_ptr, SLOW)
    second = _add_values(second, p, rescale, each, rose, v_ptr + 32 * V_WIDE, SLOW)
    return first, second, row_sum, row_max


@triton.jit(
    do_not_specialize=[
        "first_head",
        "first_sequence",
        "blocks",
        "window",
        "mean_from_block",
        "mask_keys",
        "sink_blocks",
    ]
)
def prefill(
    q_ptr, unit_ptr, mean_ptr, ordered_q_ptr, ordered_unit_ptr, counts_ptr, sink_blocks, first_ptr, valid_ptr,
    lengths_ptr,
    k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr, flag_ptr, out_ptr, lse_ptr,
    mask_ptr, mask_b, mask_h, mask_q, mask_k, mask_keys,
    first_head, first_sequence, kv_heads, group, queries, blocks, window, mean_from_block, cap, threshold,
    D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, V_WIDE: tl.constexpr, M: tl.constexpr, FORM: tl.constexpr,
    CUT: tl.constexpr, ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    MASK: tl.constexpr, MEAN: tl.constexpr, ROTATE: tl.constexpr, SLOW: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of M rows, KV heads, sequences) of a part of the batch from first_head, first_sequence on.

    q int8 [B, Hkv, g, Lq, D]; unit, mean float32 [B, Hkv, g, Lq]; unpacked of `blocks` blocks a KV head of
    that part; ordered_q, ordered_unit: queries for the blocks from sink_blocks to counts[b] (int64 [B], exclusive), or
    None, if they are the same; out [B, Hkv g, Lq, Dv] contiguous, lse float32. flag int32 [1] or None: where it is not
    0, results are NaN.
    """
    own = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    b = first_sequence + tl.program_id(2)
    h = first_head + tl.program_id(1)
    # With a causal mask the last rows have the most visible keys, so they are first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    there = row < queries * group
    # 32 bits, since these values stay in registers to the end: at head_dim 256 none are free.
    base = (b * kv_heads + h).to(tl.int64) * group * queries
    at = row % group * queries + row // group
    d = tl.arange(0, WIDE)
    inside = there[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + base * D + at.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0)
    unit = tl.load(unit_ptr + base + at, mask=there, other=1.0)
    if ordered_q_ptr is None:
        ordered = None
    else:
        ordered_q = tl.load(ordered_q_ptr + base * D + at.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0)
        ordered_unit = tl.load(ordered_unit_ptr + base + at, mask=there, other=1.0)
        ordered = (ordered_q, ordered_unit, sink_blocks, tl.load(counts_ptr + b).to(tl.int32))
    mean = tl.zeros_like(unit)
    if MEAN:
        mean = tl.load(mean_ptr + base + at, mask=there, other=0.0)
    first = tl.load(first_ptr + b).to(tl.int32)
    valid = tl.load(valid_ptr + b).to(tl.int32)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    begin, end = visible_range(row, group, first, valid, length, window, CAUSAL, WINDOW)
    some = end > begin
    low = tl.min(tl.where(some, begin, length), 0) // 64
    high = tl.cdiv(tl.max(end, 0), 64)
    # Blocks that all rows see completely; rows without visible keys are masked at the end.
    clear = tl.maximum(tl.cdiv(tl.max(tl.where(some, begin, 0), 0), 64), low)
    clear_end = tl.maximum(tl.minimum(tl.min(tl.where(some, end, length), 0) // 64, high), clear)
    if MASK != "":
        clear = high
        clear_end = high
    blocks_before = own.to(tl.int64) * blocks
    k_ptr += blocks_before * (64 * WIDE)
    v_ptr += blocks_before * (64 * V_WIDE)
    unpacked = (k_ptr, v_ptr, k_scale_ptr + blocks_before * 64, v_level_ptr + blocks_before * 64,
                v_scale_ptr + blocks_before)  # fmt: skip
    mask_row = tl.minimum(row, queries * group - 1)
    mask = (mask_ptr + b.to(tl.int64) * mask_b, mask_row, h * group, group, mask_h, mask_q, mask_k, mask_keys)
    visible = (begin, end, mask)
    first_half = tl.zeros((M, V_WIDE // 2), tl.float32)
    second_half = tl.zeros((M, V_WIDE // 2), tl.float32)
    row_sum = tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), float("-inf"), tl.float32)
    if MASK == "":
        for block in tl.range(clear, clear_end):
            first_half, second_half, row_sum, row_max = _fold_block(
                first_half, second_half, row_sum, row_max, q, unit, ordered, mean, mean_from_block, block, unpacked,
                visible, cap, threshold,
                WIDE, V_WIDE, FORM, CUT, ROW, False, CAP, MASK, MEAN, SLOW, SKIP,
            )  # fmt: skip
    before = tl.maximum(tl.minimum(clear, high) - low, 0)
    for i in tl.range(0, before + tl.maximum(high - tl.maximum(clear_end, low), 0)):
        block = tl.where(i < before, low + i, clear_end + i - before)
        first_half, second_half, row_sum, row_max = _fold_block(
            first_half, second_half, row_sum, row_max, q, unit, ordered, mean, mean_from_block, block, unpacked,
            visible, cap, threshold,
            WIDE, V_WIDE, FORM, CUT, ROW, True, CAP, MASK, MEAN, SLOW, SKIP,
        )  # fmt: skip
    row_sum = tl.where(some, row_sum, 0.0)
    acc = tl.reshape(tl.permute(tl.join(first_half, second_half), (0, 2, 1)), (M, V_WIDE))
    out = acc * tl.where(row_sum > 0.0, 1.0 / tl.maximum(row_sum, 1.0), 0.0)[:, None]
    if ROTATE:
        out = rotate_back(out, M, V_WIDE, DV & -DV, False)
    result = log_sum_exp(row_max, row_sum)
    if flag_ptr is not None:
        bad = tl.load(flag_ptr) != 0
        out = tl.where(bad, float("nan"), out)
        result = tl.where(bad, float("nan"), result)
    c = tl.arange(0, V_WIDE)[None, :]
    to = out_ptr + base * DV + at.to(tl.int64)[:, None] * DV + c
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=there[:, None] & (c < DV))
    tl.store(lse_ptr + base + at, result, mask=there)
