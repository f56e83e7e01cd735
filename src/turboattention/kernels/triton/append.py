"""Launchers that store new tokens in a cache's INT8 buffer during decode, and compress full blocks into pages."""

from __future__ import annotations

import triton
from torch import Tensor

from ...config import TurboConfig
from ...errors import UnsupportedError
from ...kv.layout import PageLayout
from .arguments import TOKEN_SCALES, check_tiles, float_rows, indices, means, pair_shape
from .ordering import Order, order_rows
from .page_offsets import all_page_offsets
from .pages import layout_facts, refusal
from .storing import fill_pages, store_rows

Pair = tuple[Tensor, Tensor]
"""A tensor for keys and one for values."""


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
    """Quantize new tokens t < counts[b] of k [B, H, T, D], v [B, H, T, Dv] (any strides) into rows
    `lengths[b] - start[b] + t` of the buffer. Other tokens are not read.

    lengths, counts, start: int64 [B], tokens stored before, new tokens, position of the buffer's row 0.
    mean: bfloat16 [B, H, D], subtracted from keys from position `mean_from` on, or None.
    codes: int8 [B, H, W, D or Dv]; scales: float32 or bfloat16 [B, H, W]; contiguous outputs. Rows from W on are
    dropped.
    flag: int32 [1], set to 1 if a row is not finite or exceeds 1e18 in magnitude; it is stored as zeros with scale 1.

    Raises DtypeError.
    """
    batch, heads, tokens, head_dim = new[0].shape
    v_head_dim = new[1].shape[3]
    k, v = map(float_rows, new)
    for side in zip(codes, scales, strict=True):
        check_tiles(*side, TOKEN_SCALES)
    rows = batch * heads * tokens
    if rows:
        shape = pair_shape(rows, head_dim, v_head_dim)
        lengths, counts, start = (indices(x, k) for x in (lengths, counts, start))
        strides = (x.stride(dim) for x in (k, v) for dim in (0, 2, 1))
        store_rows[(triton.cdiv(rows, shape["ROWS"]), 2)](
            k, v, means(mean), lengths, counts, start, None, None, *codes, *scales, None, None, None, None, flag,
            rows, heads, tokens, None, None, codes[0].shape[2], None, mean_from, *strides,
            ROTATE=config.rotate, PAGED=False, **shape,
        )  # fmt: skip


def flush_blocks(
    layout: PageLayout, codes: Pair, scales: Pair, fresh: Tensor, search: bool, order: Order | None = None,
    rotated: bool = False,
) -> None:  # fmt: skip
    """Compress the first block of the buffer into page `fresh[b]`, for every sequence where that is not 0.

    fresh: int64 [B], addresses (multiples of 16) of pages with this layout. codes: int8 [B, H, W, D or Dv], scales:
    float32 or bfloat16 [B, H, W], contiguous, W at least a block; rows after the block move to the front, followed by
    zeros. Other sequences do not change. order: that of K's channels in these pages, or None; rotated: whether the
    buffer's rows are. Raises DtypeError, UnsupportedError.
    """
    refused = refusal(layout)
    if refused:
        raise UnsupportedError(refused)
    for side in zip(codes, scales, strict=True):
        check_tiles(*side, TOKEN_SCALES)
    batch, heads, width, _ = codes[0].shape
    if batch * heads:
        fresh = indices(fresh, codes[0])
        if order is not None:
            order_rows(codes[0], scales[0], order, rotated, layout.block_size, fresh)
        fill_pages[(batch, 2, heads)](
            *codes, *scales, all_page_offsets(layout, codes[0].device), fresh, None, None, None, None, None,
            width, None, None, None, None, None, SEARCH=search, RING=False, PAGED=False, **layout_facts(layout),
        )  # fmt: skip
