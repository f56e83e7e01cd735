"""Attention of many query rows over pages that a server manages, restored to INT8 as they are read, or beforehand.

A program computes M rows of a sequence of more than `most` rows (`paged_decode` computes the others). Every query
reads the blocks before its own as pages, and its own block as INT8 rows. Pages that `restored_pages` has restored are
read from its memory. Results are bit-identical either way, except with a window and another M: blocks that all rows of
a program see are accumulated first, so M changes the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .page_offsets import OFFSETS, section_offsets
from .ragged import sequence_at, span_of, tail_rows_of
from .restored_pages import are_restored, first_block
from .restoring import halves, page_keys, page_values
from .rotation import rotate_back
from .softmax import as_float, rescaled
from .stored import weigh_stored
from .unpacked_kv import by_value_columns, token_scales


@triton.jit
def _weights(
    k, k_scale, v_scale, key, queries, sees, sees_end, cap, threshold,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, SEEN: tl.constexpr, OWN: tl.constexpr, CAP: tl.constexpr,
    SLOW: tl.constexpr,
):  # fmt: skip
    """The result of `weigh_stored` for INT8 keys [WIDE, 64]."""
    q, unit, mean = queries
    s = as_float(tl.dot(q, k, out_dtype=tl.int32), SLOW) * k_scale[None, :]
    return weigh_stored(s, unit, mean, key, v_scale, sees, sees_end, cap, threshold, FORM, CUT, ROW, SEEN, OWN, CAP, 1)


@triton.jit
def _scaled(state, weighed):
    """The running sum and maximum with these weights, and the factors of the result and of the block's products."""
    _, _, row_sum, row_max = state
    _, block_sum, block_max, largest = weighed
    row_max, rescale, each = rescaled(row_max, block_max)
    return row_sum * rescale + block_sum * each, row_max, rescale, each * largest


@triton.jit
def _add_values(acc, p, v, rescale, each, SLOW: tl.constexpr):
    """acc * rescale + each * (p V) for INT8 values V [64, N], acc [M, N]."""
    o = as_float(tl.dot(p.to(tl.int8), v, out_dtype=tl.int32), SLOW)
    return tl.fma(o, each[:, None], acc * rescale[:, None])


@triton.jit
def _fold_page(
    state, source, block, queries, sees, sees_end, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BY_TOKEN: tl.constexpr,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, SEEN: tl.constexpr, OWN: tl.constexpr, CAP: tl.constexpr,
    SLOW: tl.constexpr, ASM: tl.constexpr, RESTORED: tl.constexpr,
):  # fmt: skip
    """Accumulate a page. source: (pages, page stride, the sequence's page numbers, the head's offsets) or, RESTORED,
    (k, v, their scales, index of the sequence's block 0 among restored blocks)."""
    HALF: tl.constexpr = WIDE // 2
    t = tl.arange(0, 64)
    if RESTORED:
        k_ptr, v_ptr, k_scales, v_scales, first = source
        at = first + block
        k_scale = tl.load(k_scales + at * 64 + t)
        v_scale = tl.load(v_scales + at * 64 + t)
        k = tl.load(k_ptr + at * (64 * WIDE) + t[None, :] * WIDE + tl.arange(0, WIDE)[:, None])
    else:
        pages, page_stride, table, k_offsets, v_offsets = source
        page = tl.multiple_of(pages + tl.load(table + block).to(tl.int64) * page_stride, 16)
        k_scale = token_scales(page, k_offsets, t, BY_TOKEN)
        v_scale = token_scales(page, v_offsets, t, BY_TOKEN)
        k = tl.trans(page_keys(page, k_offsets, WIDE, D, K_BITS, ASM))
    weighed = _weights(
        k, k_scale, v_scale, block * 64 + t, queries, sees, sees_end, cap, threshold, FORM, CUT, ROW, SEEN, OWN, CAP,
        SLOW,
    )  # fmt: skip
    row_sum, row_max, rescale, each = _scaled(state, weighed)
    if RESTORED:
        p = by_value_columns(weighed[0])
        v_ptr += at * (64 * WIDE) + tl.arange(0, HALF)[None, :] * 64 + t[:, None]
        first_half = _add_values(state[0], p, tl.load(v_ptr), rescale, each, SLOW)
        second_half = _add_values(state[1], p, tl.load(v_ptr + HALF * 64), rescale, each, SLOW)
    else:
        # Restored after the weights are computed, in halves of the channels: all at once would need too many registers.
        v = tl.trans(page_values(page, v_offsets, 0, HALF, D, V_BITS, ASM))
        first_half = _add_values(state[0], weighed[0], v, rescale, each, SLOW)
        v = tl.trans(page_values(page, v_offsets, HALF, HALF, D, V_BITS, ASM))
        second_half = _add_values(state[1], weighed[0], v, rescale, each, SLOW)
    return first_half, second_half, row_sum, row_max


@triton.jit
def _fold_rows(
    state, rows, block, length, queries, sees, sees_end, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, CAP: tl.constexpr,
    SLOW: tl.constexpr,
):  # fmt: skip
    """Accumulate a block of INT8 rows. rows: (k8, v8, their scales, the row of the block's token 0)."""
    k8, v8, k_scales, v_scales, origin = rows
    t = tl.arange(0, 64)
    d = tl.arange(0, WIDE // 2)
    key = block * 64 + t
    there = key < length
    at = (origin + t)[:, None] * D
    channel = tl.arange(0, WIDE)
    k = tl.load(k8 + at + channel[None, :], mask=there[:, None] & (channel < D)[None, :], other=0)
    # Permuted to the order of `halves` in registers: gathering in that order would load every byte separately.
    k = tl.reshape(tl.permute(tl.reshape(k, (64, WIDE // 8, 2, 4)), (0, 2, 1, 3)), (64, WIDE))
    k = tl.trans(k)
    k_scale = tl.load(k_scales + origin + t, mask=there, other=0.0)
    v_scale = tl.load(v_scales + origin + t, mask=there, other=0.0)
    weighed = _weights(
        k, k_scale, v_scale, key, queries, sees, sees_end, cap, threshold, FORM, CUT, ROW, True, True, CAP, SLOW
    )
    row_sum, row_max, rescale, each = _scaled(state, weighed)
    v = tl.load(v8 + at + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    first = _add_values(state[0], weighed[0], v, rescale, each, SLOW)
    d += WIDE // 2
    v = tl.load(v8 + at + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    second = _add_values(state[1], weighed[0], v, rescale, each, SLOW)
    return first, second, row_sum, row_max


@triton.jit
def _rows_of(tile, rows, M: tl.constexpr):
    """Rows of a tile, and which of them exist. The last rows have the most visible keys, so they are first."""
    row = (tl.cdiv(rows, M) - 1 - tile) * M + tl.arange(0, M)
    return row, row < rows


@triton.jit(
    do_not_specialize=[
        "sequences", "bisections", "table_stride", "ring", "room", "tokens", "most", "window", "capacity",
    ]
)  # fmt: skip
def paged_prefill(
    q_ptr, unit_ptr, mean_ptr, starts, lengths, tail_slots, table, table_stride, pages, page_stride, page_offsets_ptr,
    k8, v8, k_scales, v_scales, ring, room,
    origins, restored_k, restored_v, restored_k_scales, restored_v_scales, capacity,
    out_ptr, out_stride_t, out_stride_h,
    sequences, bisections, kv_heads, group, tokens, most, window, cap, threshold,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    BY_TOKEN: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, MEAN: tl.constexpr, RING: tl.constexpr, ROTATE: tl.constexpr, SLOW: tl.constexpr,
    ASM: tl.constexpr, RESTORED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads of one pair of widths): tile i belongs to the last sequence b with
    `starts[b] group // M + b <= i`. q int8 [Hkv, g, T, D], unit and mean float32 [Hkv, g, T], out [T, Hkv g, D].

    RESTORED: computes the sequences whose pages `restore_pages` restored, otherwise the others; origins None: nothing
    was restored."""
    i = tl.program_id(0)
    b = sequence_at(starts, sequences, bisections, i, group, M, 1)
    start, count, length = span_of(starts, lengths, b)
    tile = i - (start * group // M + b)
    taken = (count * group > most) & (tile * M < count * group)
    if origins is not None:
        taken = taken & (are_restored(origins, b, capacity) == RESTORED)
    if taken:
        row, there = _rows_of(tile, count * group, M)
        head_ptr = page_offsets_ptr + tl.program_id(1) * OFFSETS
        h = tl.load(head_ptr)
        at = (h * group + row % group).to(tl.int64) * tokens + start + row // group
        unit = tl.load(unit_ptr + at, mask=there, other=1.0)
        mean = tl.zeros_like(unit)
        if MEAN:
            mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        channel = halves(WIDE)[None, :]
        q = tl.load(q_ptr + at[:, None] * D + channel, mask=there[:, None] & (channel < D), other=0)
        queries = (q, unit, mean)
        before = length - count
        # Rows past the last repeat its range; they are dropped.
        position = before + tl.minimum(row, count * group - 1) // group
        own = position // 64 * 64
        sees = tl.zeros_like(row)
        if WINDOW:
            sees = tl.maximum(position - window + 1, 0)
        oldest = tl.min(position, 0) // 64
        newest = tl.max(position, 0) // 64
        low = tl.min(sees, 0) // 64
        # Pages that all rows see completely.
        clear = tl.minimum(tl.cdiv(tl.max(sees, 0), 64), oldest)
        # Both halves of the result's channels, the sum and the maximum of each row's weights.
        half = tl.zeros((M, WIDE // 2), tl.float32)
        state = half, half, tl.zeros((M,), tl.float32), tl.full((M,), float("-inf"), tl.float32)
        if RESTORED:
            first = h.to(tl.int64) * capacity + tl.load(origins + b) - first_block(before, window, WINDOW)
            source = restored_k, restored_v, restored_k_scales, restored_v_scales, first
        else:
            k_offsets, v_offsets = section_offsets(head_ptr, D, D)
            source = pages, page_stride, table + b.to(tl.int64) * table_stride, k_offsets, v_offsets
        for block in tl.range(clear, oldest):
            state = _fold_page(
                state, source, block, queries, sees, own, cap, threshold,
                WIDE, D, K_BITS, V_BITS, BY_TOKEN, FORM, CUT, ROW, False, False, CAP, SLOW, ASM, RESTORED,
            )  # fmt: skip
        for j in tl.range(0, clear - low + newest - oldest, num_stages=1):
            block = tl.where(j < clear - low, low + j, oldest + j - (clear - low))
            state = _fold_page(
                state, source, block, queries, sees, own, cap, threshold,
                WIDE, D, K_BITS, V_BITS, BY_TOKEN, FORM, CUT, ROW, True, WINDOW, CAP, SLOW, ASM, RESTORED,
            )  # fmt: skip
        # Loaded again: the page loop leaves no registers for values that only tail rows and the output need.
        h = tl.load(head_ptr)
        start, count, length = span_of(starts, lengths, b)
        row, there = _rows_of(i - (start * group // M + b), count * group, M)
        position = length - count + tl.minimum(row, count * group - 1) // group
        for block in tl.range(oldest, newest + 1, num_stages=1):
            origin = tail_rows_of(tail_slots, b, h, kv_heads, start, block, (length - count) // 64, ring, room, RING)
            state = _fold_rows(
                state, (k8, v8, k_scales, v_scales, origin), block, length, queries,
                tl.maximum(sees, position // 64 * 64), position + 1, cap, threshold, WIDE, D, FORM, CUT, ROW, CAP, SLOW,
            )  # fmt: skip
        first_half, second_half, row_sum, _ = state
        acc = tl.reshape(tl.permute(tl.join(first_half, second_half), (0, 2, 1)), (M, WIDE))
        out = acc * (1.0 / tl.maximum(row_sum, 1.0))[:, None]
        if ROTATE:
            out = rotate_back(out, M, WIDE, D & -D, False)
        to = (start + row // group).to(tl.int64) * out_stride_t + (h * group + row % group).to(tl.int64) * out_stride_h
        d = tl.arange(0, WIDE)[None, :]
        tl.store(out_ptr + to[:, None] + d, out.to(out_ptr.dtype.element_ty), mask=there[:, None] & (d < D))
