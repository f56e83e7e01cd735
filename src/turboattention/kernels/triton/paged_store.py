"""Storing over pages that a server manages: new tokens into open blocks, blocks that are full into their pages.

Open blocks are rows in slots, or, where a step's tokens would overwrite rows that its queries still read, rows of the
step's own: `hold_rows` then brings the older rows of each open block there, and what stays open is written to
the slot as well. Nothing waits for the device, and grids follow from shapes alone.
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
    starts, lengths, slots, k_ring, v_ring, k_ring_scales, v_ring_scales, k_codes, v_codes, k_scales, v_scales,
    ring, room, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, heads, K or V): rows that are in a slot, of the block where the step begins, into its own."""
    b, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, count, length = span_of(starts, lengths, b)
    before = length - count
    held = before % 64
    if (count > 0) & (held > 0):
        token = tl.arange(0, 64)
        at = tail_rows_of(slots, b, h, heads, first, before // 64, before // 64, ring, room, True) + token
        to = tail_rows_of(slots, b, h, heads, first, before // 64, before // 64, ring, room, False) + token
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
def _stage_side(
    x, offsets, wanted, mean, h, flag, codes, scales, row, ring_codes, ring_scales, ring_row, kept,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    values, scale = stage_rows(x, offsets, wanted, mean, h, wanted, flag, D, ROWS, WIDTH, ROTATE)
    store_codes(ring_codes, ring_row, kept, values, D, WIDTH)
    tl.store(ring_scales + ring_row, scale, mask=kept)
    if not RING:
        store_codes(codes, row, wanted, values, D, WIDTH)
        tl.store(scales + row, scale, mask=wanted)


@triton.jit(do_not_specialize=["rows", "sequences", "steps", "ring", "room"])
def store_rows(
    k, v, mean, starts, lengths, slots, k_ring, v_ring, k_ring_scales, v_ring_scales,
    k_codes, v_codes, k_scales, v_scales, flag,
    rows, heads, sequences, steps, ring, room, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Grid (parts of ROWS of the flat tokens' heads, K or V): quantized into slots, and, without RING, into the
    step's own rows, where slots get what belongs to blocks that stay open (with a ring of two, the last two).
    mean [heads, D] or None, off the keys."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h = row // heads, row % heads
    b = sequence_at(starts, sequences, steps, t, 1, 1, 0)
    first, count, length = span_of(starts, lengths, b)
    wanted = (row < rows) & (t < first + count)
    before = length - count
    position = before + t - first
    block = position // 64
    ring_row = tail_rows_of(slots, b, h, heads, first, block, block, ring, room, True) + position % 64
    own_row = ring_row
    kept = wanted
    if not RING:
        own_row = tail_rows_of(slots, b, h, heads, first, block, before // 64, ring, room, False) + position % 64
        kept = wanted & (block * 64 + ring > length)
    if tl.program_id(1) == 0:
        offsets = t.to(tl.int64) * k_stride_t + h.to(tl.int64) * k_stride_h
        _stage_side(
            k, offsets, wanted, mean, h, flag, k_codes, k_scales, own_row, k_ring, k_ring_scales, ring_row, kept,
            D, ROWS, WIDTH, ROTATE, RING,
        )  # fmt: skip
    else:
        offsets = t.to(tl.int64) * v_stride_t + h.to(tl.int64) * v_stride_h
        _stage_side(
            v, offsets, wanted, None, h, flag, v_codes, v_scales, own_row, v_ring, v_ring_scales, ring_row, kept,
            D, ROWS, WIDTH, ROTATE, RING,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "steps", "ring", "room", "table_stride"])
def fill_pages(
    starts, lengths, slots, k_codes, v_codes, k_scales, v_scales, table, pages, page_offsets,
    sequences, steps, ring, room, table_stride, page_stride,
    HEADS: tl.constexpr, PAGE_BYTES: tl.constexpr, USED: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTHS: tl.constexpr, BY_TOKEN: tl.constexpr, SEARCH: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Grid (heads, K or V, sequences or, without RING, blocks that may fill): those that the step fills into
    their pages. In a slot a step fills one block at most."""
    h, i = tl.program_id(0), tl.program_id(2)
    b = i
    if not RING:
        b = sequence_at(starts, sequences, steps, i, 1, 64, 1)
    first, count, length = span_of(starts, lengths, b)
    start = (length - count) // 64
    block = start
    if not RING:
        block = start + i - (first // 64 + b)
    if (count > 0) & (block * 64 + 64 <= length):
        number = tl.load(table + b.to(tl.int64) * table_stride + block).to(tl.int64)
        page = tl.multiple_of(pages + number * page_stride, 16)
        row = tail_rows_of(slots, b, h, HEADS, first, block, start, ring, room, RING)
        if tl.program_id(1) == 0:
            head_ptr = page_offsets + h * OFFSETS + OF_KEYS
            encode_head(k_codes + row * D, k_scales + row, page, head_ptr, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
            if h == 0:
                clear_padding(page, USED, PAGE_BYTES)
        else:
            head_ptr = page_offsets + h * OFFSETS + OF_VALUES
            encode_head(v_codes + row * D, v_scales + row, page, head_ptr, 1, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
