"""Storing new tokens as INT8 rows, and compressing blocks of rows that are full into pages.

A cache has a buffer of rows per sequence, whose first row has position `start`, and addresses of pages. A server
(PAGED) has a tail slot of rows per sequence, where position p is row p % width, and numbers of pages. If a server's
step would overwrite rows that its queries still read, it attends to temporary rows: `hold_rows` first copies the older
rows of each tail block there, and rows of blocks that remain incomplete are written to the slot as well.

Kernels read lengths, positions and page tables from device memory and grids follow from shapes alone, so the host does
not wait, and a CUDA graph can replay the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codec import clear_padding, encode_head
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS
from .ragged import sequence_at, span_of, tail_rows_of
from .rows import stage_rows, store_codes


@triton.jit(do_not_specialize=["ring", "room"])
def hold_rows(
    starts, lengths, tail_slots, k_ring, v_ring, k_ring_scales, v_ring_scales, k_codes, v_codes, k_scales, v_scales,
    ring, room, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, heads, K or V): copies a slot's rows of the block where the step begins to temporary rows."""
    b, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, count, length = span_of(starts, lengths, b)
    before = length - count
    held = before % 64
    if (count > 0) & (held > 0):
        token = tl.arange(0, 64)
        at = tail_rows_of(tail_slots, b, h, heads, first, before // 64, before // 64, ring, room, True) + token
        to = tail_rows_of(tail_slots, b, h, heads, first, before // 64, before // 64, ring, room, False) + token
        channel = tl.arange(0, WIDTH)[None, :]
        there = token < held
        if tl.program_id(2) == 0:
            codes = tl.load(k_ring + at[:, None] * D + channel, mask=there[:, None] & (channel < D), other=0)
            tl.store(k_codes + to[:, None] * D + channel, codes, mask=there[:, None] & (channel < D))
            tl.store(k_scales + to, tl.load(k_ring_scales + at, mask=there, other=0.0), mask=there)
        else:
            codes = tl.load(v_ring + at[:, None] * D + channel, mask=there[:, None] & (channel < D), other=0)
            tl.store(v_codes + to[:, None] * D + channel, codes, mask=there[:, None] & (channel < D))
            tl.store(v_scales + to, tl.load(v_ring_scales + at, mask=there, other=0.0), mask=there)


@triton.jit
def _offsets(b, t, h, stride_b, stride_t, stride_h, PAGED: tl.constexpr):
    """Offsets of the rows of tokens t and heads h in x [B, H, T, D], or PAGED in flat x [T, H, D]."""
    offsets = t * stride_t + h * stride_h
    if not PAGED:
        offsets += b * stride_b
    return offsets


@triton.jit
def _store_side(
    x, offsets, wanted, mean, mean_row, smoothed, flag, codes, scales, row, kept, own_codes, own_scales, own_row,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Store the `kept` rows in codes and scales, and all `wanted` rows in own_codes and own_scales, unless None."""
    values, scale = stage_rows(x, offsets, wanted, mean, mean_row, smoothed, flag, D, ROWS, WIDTH, ROTATE)
    store_codes(codes, row, kept, values, D, WIDTH)
    tl.store(scales + row, scale.to(scales.dtype.element_ty), mask=kept)
    if own_codes is not None:
        store_codes(own_codes, own_row, wanted, values, D, WIDTH)
        tl.store(own_scales + own_row, scale, mask=wanted)


@triton.jit(do_not_specialize=["rows", "tokens", "sequences", "bisections", "width", "room", "mean_from"])
def store_rows(
    k, v, mean, lengths, counts, start, starts, tail_slots,
    k_codes, v_codes, k_scales, v_scales, k_own, v_own, k_own_scales, v_own_scales, flag,
    rows, heads, tokens, sequences, bisections, width, room, mean_from,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROTATE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Grid (parts of ROWS of the heads of all tokens, K or V): quantizes new tokens into rows of `width` per sequence
    and head.

    A cache: k [B, H, T, D], v [B, H, T, Dv], tokens t < counts[b] behind lengths[b]; mean bfloat16 [B, H, D],
    subtracted from keys from position mean_from on; tokens past the buffer's end are dropped.
    PAGED: flat k, v [T, H, D] (Dv is D), lengths with the step's tokens, mean bfloat16 [H, D]. With temporary rows
    (k_own is not None), slots get the rows of blocks that remain incomplete (of the last two blocks, if width is two
    blocks).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    own_row = row
    if PAGED:
        t, h = row // heads, row % heads
        b = sequence_at(starts, sequences, bisections, t, 1, 1, 0)
        first, count, length = span_of(starts, lengths, b)
        wanted = there & (t < first + count)
        before = length - count
        position = before + t - first
        block = position // 64
        to = tail_rows_of(tail_slots, b, h, heads, first, block, block, width, room, True) + position % 64
        kept = wanted
        if k_own is not None:
            own_row = (
                tail_rows_of(tail_slots, b, h, heads, first, block, before // 64, width, room, False) + position % 64
            )
            kept = wanted & (block * 64 + width > length)
        mean_row, smoothed = h, wanted
        t, h = t.to(tl.int64), h.to(tl.int64)
    else:
        mean_row, t = row // tokens, (row % tokens).to(tl.int64)
        b, h = (mean_row // heads).to(tl.int64), (mean_row % heads).to(tl.int64)
        there &= t < tl.load(counts + b, mask=there, other=0)
        position = tl.load(lengths + b, mask=there, other=0) + t
        in_buffer = position - tl.load(start + b, mask=there, other=0)
        wanted = there & (in_buffer >= 0) & (in_buffer < width)
        to = mean_row.to(tl.int64) * width + in_buffer
        kept = wanted
        smoothed = position >= mean_from
    if tl.program_id(1) == 0:
        offsets = _offsets(b, t, h, k_stride_b, k_stride_t, k_stride_h, PAGED)
        _store_side(
            k, offsets, wanted, mean, mean_row, smoothed, flag, k_codes, k_scales, to, kept,
            k_own, k_own_scales, own_row, D, ROWS, WIDTH, ROTATE,
        )  # fmt: skip
    else:
        offsets = _offsets(b, t, h, v_stride_b, v_stride_t, v_stride_h, PAGED)
        _store_side(
            v, offsets, wanted, None, mean_row, wanted, flag, v_codes, v_scales, to, kept,
            v_own, v_own_scales, own_row, DV, ROWS, V_WIDTH, ROTATE,
        )  # fmt: skip


@triton.jit
def _move_rows(codes, scales, width, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Move the rows after the first SIZE of a buffer to its front, followed by zeros."""
    token = tl.arange(0, SIZE)
    channel = tl.max_contiguous(tl.arange(0, WIDTH), 4)[None, :]  # the register layout of `encode_head`
    for at in range(0, width, SIZE):
        behind = at + SIZE + token
        moved = tl.load(codes + behind[:, None] * D + channel, mask=(behind < width)[:, None] & (channel < D), other=0)
        scale = tl.load(scales + behind, mask=behind < width, other=0.0)
        tl.debug_barrier()  # all loads finish before rows are overwritten
        here = at + token
        tl.store(codes + here[:, None] * D + channel, moved, mask=(here < width)[:, None] & (channel < D))
        tl.store(scales + here, scale, mask=here < width)


@triton.jit(do_not_specialize=["width", "sequences", "bisections", "room", "table_stride"])
def fill_pages(
    k_codes, v_codes, k_scales, v_scales, page_offsets, fresh, lengths, starts, tail_slots, table, pages,
    width, sequences, bisections, room, table_stride, page_stride,
    HEADS: tl.constexpr, PAGE_BYTES: tl.constexpr, USED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, WIDTHS: tl.constexpr, BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr, RING: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Grid (sequences or blocks, K or V, heads): compresses full blocks into their pages.

    A cache: the first block of the buffer of `width` rows goes to the page at address fresh[b], if that is not 0, and
    later rows move to the front.
    PAGED: blocks that the step fills; at most one per sequence if they are in tail slots (RING), else the first axis of
    the grid counts blocks that may fill.
    """
    i, h = tl.program_id(0), tl.program_id(2)
    if PAGED:
        b = i
        if not RING:
            b = sequence_at(starts, sequences, bisections, i, 1, 64, 1)
        first, count, length = span_of(starts, lengths, b)
        start = (length - count) // 64
        block = start
        if not RING:
            block = start + i - (first // 64 + b)
        fills = (count > 0) & (block * 64 + 64 <= length)
    else:
        b = i.to(tl.int64)
        address = tl.load(fresh + b)
        fills = address != 0
    if fills:
        if PAGED:
            number = tl.load(table + b.to(tl.int64) * table_stride + block).to(tl.int64)
            page = tl.multiple_of(pages + number * page_stride, 16)
            row = tail_rows_of(tail_slots, b, h, HEADS, first, block, start, width, room, RING)
        else:
            page = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
            row = (b * HEADS + h) * width
        if tl.program_id(1) == 0:
            head_ptr = page_offsets + h * OFFSETS + OF_KEYS
            encode_head(k_codes + row * D, k_scales + row, page, head_ptr, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
            if not PAGED:
                _move_rows(k_codes + row * D, k_scales + row, width, D, SIZE, WIDTH)
            if h == 0:
                clear_padding(page, USED, PAGE_BYTES)
        else:
            head_ptr = page_offsets + h * OFFSETS + OF_VALUES
            v_codes += row * DV
            encode_head(v_codes, v_scales + row, page, head_ptr, 1, DV, SIZE, V_WIDTH, WIDTHS, BY_TOKEN, SEARCH)
            if not PAGED:
                _move_rows(v_codes, v_scales + row, width, DV, SIZE, V_WIDTH)
