"""Accumulates blocks into the running result of decode: packed pages, and INT8 rows.

Operands are transposed, as in `products`: query rows are columns. PAGED: the page table has indices into a server's
pages, and weights are those of `stored_prefill` (`stored`). Otherwise it has addresses (0: evicted), and keys from
block `mean_from_block` on are stored without their mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .metadata import key_metadata, scales_of, value_metadata
from .page_offsets import section_offsets
from .products import key_products, value_products
from .softmax import LEVELS, rescaled, weigh
from .stored import weigh_stored
from .unpacked_kv import largest_of
from .unpacking import stack


@triton.jit
def _page(entry, pages, page_stride, PAGED: tl.constexpr):
    """The page of a table entry: an index into `pages`, or an address (`pages` itself for an evicted page)."""
    if PAGED:
        page = pages + entry * page_stride
    else:
        entry = tl.where(entry == 0, pages.to(tl.int64), entry)
        page = entry.to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(page, 16)


@triton.jit
def over_pages(
    acc, row_sum, row_max, table_ptr, pages, page_stride, begin, end, head_ptr, queries, visible, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, V_WIDE: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, BY_TOKEN: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Folds pages `begin` to `end` of one layout in. queries: both halves of `products.key_products`, unit, mean,
    mean_from_block; visible: as in `softmax.weigh`."""
    q_first, q_second, unit, mean, mean_from_block = queries
    k_offsets, v_offsets = section_offsets(head_ptr, D, DV)
    t = tl.arange(0, 64)
    # Loaded a block ahead, so that loads of pages can be issued ahead as well.
    ahead = tl.load(table_ptr + begin, mask=begin < end, other=0).to(tl.int64)
    page = _page(ahead, pages, page_stride, PAGED)
    of_keys = key_metadata(page, k_offsets, WIDE, D, K_BITS, BY_TOKEN)
    of_values = value_metadata(page, v_offsets, V_WIDE, DV, V_BITS, BY_TOKEN)
    for block in tl.range(begin, end, num_stages=STAGES):
        page = _page(ahead, pages, page_stride, PAGED)
        evicted = ahead == 0
        ahead = tl.load(table_ptr + tl.minimum(block + 1, end - 1)).to(tl.int64)
        following = _page(ahead, pages, page_stride, PAGED)
        next_of_keys = key_metadata(following, k_offsets, WIDE, D, K_BITS, BY_TOKEN)
        next_of_values = value_metadata(following, v_offsets, V_WIDE, DV, V_BITS, BY_TOKEN)
        s = key_products(page, k_offsets, of_keys, q_first, q_second, WIDE, D, K_BITS, ASM)
        s = s.to(tl.float32) * scales_of(of_keys[4], of_keys[5])[:, None]
        v_scale = scales_of(of_values[2], of_values[3])
        if PAGED:
            p, block_sum, block_max, largest = weigh_stored(
                s, unit, mean, block * 64 + t, v_scale, visible[0], visible[1], cap, threshold,
                FORM, CUT, ROW, True, WINDOW, CAP, 0,
            )  # fmt: skip
        else:
            largest = largest_of(v_scale)
            p, block_sum, block_max, share = weigh(
                s, unit, tl.where(block >= mean_from_block, mean, 0.0), block * 64 + t, v_scale / largest * LEVELS,
                visible, cap, threshold, FORM, CUT, ROW, True, CAP, MASK, 0,
            )  # fmt: skip
        o = value_products(page, v_offsets, of_values, p, V_WIDE, DV, V_BITS, ASM)
        if not PAGED:
            block_max = tl.where(evicted, float("-inf"), block_max)
        row_max, rescale, each = rescaled(row_max, block_max)
        row_sum = row_sum * rescale + block_sum * each
        if ROW and not PAGED:
            each *= share
        acc = tl.fma(o, (each * largest)[None, :], acc * rescale[None, :])
        of_keys = next_of_keys
        of_values = next_of_values
    return acc, row_sum, row_max


@triton.jit
def fold_rows(
    acc, row_sum, row_max, rows, at, block, used, q, unit, mean, mean_from_block, visible, cap, threshold,
    WIDE: tl.constexpr, D: tl.constexpr, V_WIDE: tl.constexpr, DV: tl.constexpr, FORM: tl.constexpr, CUT: tl.constexpr,
    ROW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Folds a block of INT8 rows in. rows: (k8, v8, their scales); at: the row of each token; used: the position behind
    the last row; q int8 [WIDE, R]."""
    k8_ptr, v8_ptr, ks_ptr, vs_ptr = rows
    d = tl.arange(0, WIDE)
    key = block * 64 + tl.arange(0, 64)
    there = key < used
    k = tl.load(k8_ptr + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    s = tl.dot(k, q, out_dtype=tl.int32).to(tl.float32)
    s *= tl.load(ks_ptr + at, mask=there, other=0.0).to(tl.float32)[:, None]
    v_scale = tl.load(vs_ptr + at, mask=there, other=0.0).to(tl.float32)
    if PAGED:
        p, block_sum, block_max, largest = weigh_stored(
            s, unit, mean, key, v_scale, visible[0], visible[1], cap, threshold, FORM, CUT, ROW, True, True, CAP, 0
        )
    else:
        largest = largest_of(v_scale)
        p, block_sum, block_max, share = weigh(
            s, unit, tl.where(block >= mean_from_block, mean, 0.0), key, v_scale / largest * LEVELS,
            visible, cap, threshold, FORM, CUT, ROW, True, CAP, MASK, 0,
        )  # fmt: skip
    # In two halves of the channels: all at once would need too many registers.
    first = _row_products(v8_ptr, at, there, p.to(tl.int8), 0, V_WIDE // 2, DV)
    second = _row_products(v8_ptr, at, there, p.to(tl.int8), V_WIDE // 2, V_WIDE // 2, DV)
    o = stack(first, second, True).to(tl.float32)
    row_max, rescale, each = rescaled(row_max, block_max)
    row_sum = row_sum * rescale + block_sum * each
    if ROW and not PAGED:
        each *= share
    return tl.fma(o, (each * largest)[None, :], acc * rescale[None, :]), row_sum, row_max


@triton.jit
def _row_products(v8_ptr, at, there, p, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr):
    """COUNT channels from FIRST on of INT8 values times weights p [64, R]: int32 [COUNT, R]."""
    d = FIRST + tl.arange(0, COUNT)
    v = tl.load(v8_ptr + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    return tl.dot(tl.trans(v), p, out_dtype=tl.int32)
