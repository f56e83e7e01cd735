"""Stores new tokens in the INT8 buffer during decode, and compresses full blocks into pages.

The kernels read lengths, positions and page addresses from device memory, so the host does not wait, and a CUDA graph
can replay the same launches in every step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...config import TurboConfig
from ...errors import UnsupportedError
from ...kv.layout import PageLayout
from .arguments import TOKEN_SCALES, check_tiles, float_rows, indices, means, row_shape
from .codec import clear_padding, encode_head
from .ordering import Order, order_rows
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS, all_page_offsets
from .pages import layout_facts, refusal
from .rows import stage_rows, store_codes

Pair = tuple[Tensor, Tensor]
"""A tensor for keys and one for values."""


@triton.jit(do_not_specialize=["rows", "heads", "tokens", "width", "mean_from"])
def _store_kernel(
    k,
    v,
    lengths,
    counts,
    start,
    mean,
    k_codes,
    v_codes,
    k_scales,
    v_scales,
    flag,
    rows,
    heads,
    tokens,
    width,
    mean_from,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    tile, t = row // tokens, (row % tokens).to(tl.int64)
    b, h = (tile // heads).to(tl.int64), (tile % heads).to(tl.int64)
    there &= t < tl.load(counts + b, mask=there, other=0)
    position = tl.load(lengths + b, mask=there, other=0) + t
    open_row = position - tl.load(start + b, mask=there, other=0)
    wanted = there & (open_row >= 0) & (open_row < width)
    to = tile.to(tl.int64) * width + open_row
    if tl.program_id(1) == 0:
        offsets = b * k_stride_b + h * k_stride_h + t * k_stride_t
        values, scale = stage_rows(k, offsets, wanted, mean, tile, position >= mean_from, flag, D, ROWS, WIDTH, ROTATE)
        store_codes(k_codes, to, wanted, values, D, WIDTH)
        tl.store(k_scales + to, scale.to(k_scales.dtype.element_ty), mask=wanted)
    else:
        offsets = b * v_stride_b + h * v_stride_h + t * v_stride_t
        values, scale = stage_rows(v, offsets, wanted, None, tile, wanted, flag, D, ROWS, WIDTH, ROTATE)
        store_codes(v_codes, to, wanted, values, D, WIDTH)
        tl.store(v_scales + to, scale.to(v_scales.dtype.element_ty), mask=wanted)


def store_tokens(
    config: TurboConfig,
    new: Pair,
    lengths: Tensor,
    counts: Tensor,
    start: Tensor,
    mean: Tensor | None,
    mean_from: int,
    codes: Pair,
    scales: Pair,
    flag: Tensor,
) -> None:
    """Quantize new tokens t < counts[b] of k, v [B, H, T, D] (any strides) into rows
    `lengths[b] - start[b] + t` of the buffer. Other tokens are not read.

    lengths, counts, start: int64 [B], tokens stored before, new tokens, position of the buffer's row 0.
    mean: bfloat16 [B, H, D], subtracted from keys from position `mean_from` on, or None.
    codes: int8 [B, H, W, D]; scales: float32 or bfloat16 [B, H, W]; contiguous outputs. Rows from W on are dropped.
    flag: int32 [1], set to 1 if a row is not finite or exceeds 1e18 in magnitude; it is stored as zeros with scale 1.

    Raises DtypeError.
    """
    batch, heads, tokens, head_dim = new[0].shape
    k, v = map(float_rows, new)
    for side in zip(codes, scales, strict=True):
        check_tiles(*side, TOKEN_SCALES)
    rows = batch * heads * tokens
    if rows:
        shape = row_shape(rows, head_dim)
        _store_kernel[(triton.cdiv(rows, shape["ROWS"]), 2)](
            k, v, *(indices(x, k) for x in (lengths, counts, start)), means(mean), *codes,
            *scales, flag, rows, heads, tokens, codes[0].shape[2], mean_from, *k.stride()[:3], *v.stride()[:3],
            D=head_dim, ROTATE=config.rotate, **shape,
        )  # fmt: skip


# -- full blocks -------------------------------------------------------------------------------


@triton.jit
def _flush_side(
    codes,
    scales,
    page,
    head_ptr,
    width,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    encode_head(codes, scales, page, head_ptr, SIDE, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
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


@triton.jit(do_not_specialize=["width"])
def _flush_kernel(
    k_codes,
    v_codes,
    k_scales,
    v_scales,
    fresh,
    page_offsets,
    width,
    HEADS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    USED: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    b, side, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    address = tl.load(fresh + b)
    if address != 0:
        page = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        row = (b * HEADS + head) * width
        if side == 0:
            head_ptr = page_offsets + head * OFFSETS + OF_KEYS
            _flush_side(
                k_codes + row * D, k_scales + row, page, head_ptr, width,
                0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH,
            )  # fmt: skip
            if head == 0:
                clear_padding(page, USED, PAGE_BYTES)
        else:
            head_ptr = page_offsets + head * OFFSETS + OF_VALUES
            _flush_side(
                v_codes + row * D, v_scales + row, page, head_ptr, width,
                1, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH,
            )  # fmt: skip


def flush_blocks(
    layout: PageLayout, codes: Pair, scales: Pair, fresh: Tensor, search: bool, order: Order | None = None,
    rotated: bool = False,
) -> None:  # fmt: skip
    """Compress the first block of the buffer into page `fresh[b]`, for every sequence where that is not 0.

    fresh: int64 [B], addresses (multiples of 16) of pages with this layout. codes: int8 [B, H, W, D], scales: float32
    or bfloat16 [B, H, W], contiguous, W at least a block; rows after the block move to the front, followed by zeros.
    Other sequences do not change. order: that of K's channels in these pages, or None; rotated: whether the buffer's
    rows are. Raises DtypeError, UnsupportedError.
    """
    refused = refusal(layout)
    if refused:
        raise UnsupportedError(refused)
    for side in zip(codes, scales, strict=True):
        check_tiles(*side, TOKEN_SCALES)
    batch, heads, width, _ = codes[0].shape
    if batch * heads:
        if order is not None:
            order_rows(codes[0], scales[0], order, rotated, layout.block_size, indices(fresh, codes[0]))
        _flush_kernel[(batch, 2, heads)](
            *codes, *scales, indices(fresh, codes[0]), all_page_offsets(layout, codes[0].device), width,
            SEARCH=search, **layout_facts(layout),
        )  # fmt: skip
