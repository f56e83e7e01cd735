"""Keys as INT8 rows into the form that compressed pages store (`kv.channel_order.ordered_rows`), in place."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...kv.channel_order import ChannelOrder
from ...uploads import upload
from .arguments import row_shape
from .rotation import rotate_back
from .rows import token_codes


class Order(NamedTuple):
    """A `ChannelOrder` on the device. permutation: uint8 [H, D]; halved: int8 [H], 1 for heads that it applies to."""

    permutation: Tensor
    halved: Tensor

    @classmethod
    def of(cls, order: ChannelOrder | None, beside: Tensor) -> Order | None:
        if order is None:
            return None
        permutation, halved = order.permutation.contiguous(), order.halved.byte().contiguous()
        return cls(upload(permutation, beside.device), upload(halved, beside.device))


@triton.jit(do_not_specialize=["rows", "heads", "size", "width"])
def _order_kernel(
    codes,
    scales,
    permutation,
    halved,
    fresh,
    rows,
    heads,
    size,
    width,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = row // size
    head = tile % heads
    wanted = (row < rows) & (tl.load(halved + head) != 0)
    if fresh is not None:
        wanted &= tl.load(fresh + tile // heads, mask=row < rows, other=0) != 0
    channel = tl.arange(0, WIDTH)[None, :]
    there = wanted[:, None] & (channel < D)
    at = tile.to(tl.int64) * width + row % size
    place = tl.load(permutation + head[:, None] * D + channel, mask=there, other=0)
    if ROTATED:
        x = tl.load(codes + at[:, None] * D + channel, mask=there, other=0).to(tl.float32)
        x *= tl.load(scales + at, mask=wanted, other=0.0).to(tl.float32)[:, None]
        values, scale = token_codes(rotate_back(x, ROWS, WIDTH, D & -D, True), True)
        tl.debug_barrier()  # all loads finish before rows are overwritten
        tl.store(scales + at, scale.to(scales.dtype.element_ty), mask=wanted)
        tl.store(codes + at[:, None] * D + channel, values, mask=there)
        tl.debug_barrier()  # all rows are written
    values = tl.load(codes + at[:, None] * D + place, mask=there, other=0)
    tl.debug_barrier()  # all loads finish before rows are overwritten
    tl.store(codes + at[:, None] * D + channel, values, mask=there)


def order_rows(
    codes: Tensor, scales: Tensor, order: Order, rotated: bool, size: int, fresh: Tensor | None = None
) -> None:
    """Bring the first `size` rows of every head of codes int8 [B, H, W, D] and scales [B, H, W] (contiguous) into the
    order of pages, in heads that it applies to; with `fresh` (int64 [B]) only in sequences where that is not 0."""
    batch, heads, width, head_dim = codes.shape
    rows = batch * heads * size
    if rows:
        shape = row_shape(rows, head_dim)
        _order_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            codes, scales, *order, fresh, rows, heads, size, width, D=head_dim, ROTATED=rotated, **shape
        )
