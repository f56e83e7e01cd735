"""Stage 1 with fused smoothing and rotation.

Launchers have the same arguments and bit-identical results as those of the same name in `kernels.cpu.quantize`. Index
tensors may be on the CPU or on the device.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Int8Queries
from .arguments import check_tiles, float_rows, indices, means, row_shape
from .ordering import Order
from .rotation import rotate
from .rows import flag_nonfinite, load_rows, stage_rows, store_codes, token_codes

# -- tokens ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "heads", "tokens", "width", "mean_from"])
def _tokens_kernel(
    x,
    begin,
    end,
    first,
    target,
    mean,
    codes,
    scales,
    flag,
    rows,
    heads,
    tokens,
    width,
    mean_from,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    tile, t = row // tokens, row % tokens
    b, h = tile // heads, tile % heads
    wanted = there & (t >= tl.load(begin + b, mask=there, other=0)) & (t < tl.load(end + b, mask=there, other=0))
    offsets = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    smoothed = tl.load(first + b, mask=there, other=0) + t >= mean_from
    values, scale = stage_rows(x, offsets, wanted, mean, tile, smoothed, flag, D, ROWS, WIDTH, ROTATE)
    to = tile.to(tl.int64) * width + tl.load(target + b, mask=there, other=0) + t
    store_codes(codes, to, wanted, values, D, WIDTH)
    tl.store(scales + to, scale, mask=wanted)


def quantize_tokens(
    x: Tensor,
    span: tuple[Tensor, Tensor],
    first: Tensor,
    mean: Tensor | None,
    mean_from: int,
    rotate: bool,
    codes: Tensor,
    scales: Tensor,
    target: Tensor,
    flag: Tensor | None = None,
) -> bool:
    """Rotate, smooth and quantize tokens `span[0][b] .. span[1][b]` of each sequence of x [B, H, T, D].

    Token t has position `first[b] + t`; from position `mean_from` on, mean [B, H, D] is subtracted. Token t is written
    to row `target[b] + t` of codes int8 [B, H, W, D] and scales float32 [B, H, W], both contiguous. Other tokens
    of x are not read, other rows of the result not written. span, first and target are int64 [B].

    Returns whether all values were finite and at most 1e18 in magnitude, which waits for the device. With a `flag`,
    int32 [1] on the device, that is set to 1 if they were not, and the result is True. Raises DtypeError.
    """
    batch, heads, tokens, head_dim = x.shape
    if not x.numel():
        return True
    x = float_rows(x)
    check_tiles(codes, scales)
    begin, end, first, target = (indices(i, x) for i in (*span, first, target))
    found = torch.zeros(1, dtype=torch.int32, device=x.device) if flag is None else flag
    rows = batch * heads * tokens
    shape = row_shape(rows, head_dim)
    _tokens_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        x, begin, end, first, target, means(mean), codes, scales, found, rows, heads, tokens,
        codes.shape[2], mean_from, *x.stride()[:3], D=head_dim, ROTATE=rotate, **shape,
    )  # fmt: skip
    return flag is not None or not bool(found)


# -- queries --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "heads", "group", "count", "scale", "scale_rest"])
def _queries_kernel(
    q,
    valid,
    mean,
    permutation,
    halved,
    codes,
    units,
    ordered_codes,
    ordered_units,
    mean_logits,
    flag,
    rows,
    heads,
    group,
    count,
    scale,
    scale_rest,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    head, t = row // count, row % count
    b, h = head // heads, head % heads
    wanted = there & (t < tl.load(valid + b, mask=there, other=0))
    offsets = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    x, fine = load_rows(q, offsets, wanted, D, WIDTH)
    flag_nonfinite(flag, fine)
    if ROTATE:
        x = rotate(x, ROWS, WIDTH, D & -D)
    values, unit = token_codes(x, False)
    to = row.to(tl.int64)
    store_codes(codes, to, there, values, D, WIDTH)
    tl.store(units + to, unit * scale, mask=there)
    if permutation is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        some = tl.load(halved + h // group) != 0
        taken = (wanted & fine & some)[:, None] & (channel < D)
        place = tl.load(permutation + (h // group)[:, None] * D + channel, mask=taken, other=0)
        y = tl.load(q + offsets[:, None] + place, mask=taken, other=0.0).to(tl.float32)
        values, unit = token_codes(tl.where(some[:, None], y, x), False)
        store_codes(ordered_codes, to, there, values, D, WIDTH)
        tl.store(ordered_units + to, unit * scale, mask=there)
    if mean is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        mean_row = (head // group).to(tl.int64)
        mu = tl.load(mean + mean_row[:, None] * D + channel, mask=there[:, None] & (channel < D), other=0.0)
        product = tl.sum(x.to(tl.float64) * mu.to(tl.float64), 1)
        # Float arguments of kernels are float32; the sum of two is the scale in float64.
        wide = tl.full([], scale, tl.float64) + tl.full([], scale_rest, tl.float64)
        tl.store(mean_logits + to, (wide * product).to(tl.float32), mask=there)


def quantize_queries(
    q: Tensor,
    kv_heads: int,
    valid: Tensor,
    mean: Tensor | None,
    scale: float,
    rotate: bool,
    order: Order | None = None,
    flag: Tensor | None = None,
) -> tuple[Int8Queries, Tensor]:
    """Quantize q [B, Hq, Lq, D] without waiting for the device.

    valid: int64 [B]; rows from `valid[b]` on are not read and are zeros. mean: [B, Hkv, D] or None. order: that of
    K's channels in compressed pages, or None.

    Returns the queries, also in the form for compressed pages if there is an order (heads that it does not apply to
    have the same codes twice), and `flag` (a new one if None), int32 [1] on the device, set to 1 if a row is not finite
    or exceeds 1e18 in magnitude. Such a row is read as zeros. Raises DtypeError.
    """
    batch, heads, count, head_dim = q.shape
    q = float_rows(q)
    codes = torch.empty(batch, kv_heads, heads // kv_heads, count, head_dim, dtype=torch.int8, device=q.device)
    unit = torch.empty(codes.shape[:-1], dtype=torch.float32, device=q.device)
    logits = None if mean is None else torch.empty_like(unit)
    permutation, halved = order or (None, None)
    ordered = (None, None) if order is None else (torch.empty_like(codes), torch.empty_like(unit))
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    rows = batch * heads * count
    if rows:
        shape, single = row_shape(rows, head_dim), float(np.float32(scale))
        _queries_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            q, indices(valid, q), means(mean), permutation, halved, codes, unit, *ordered, logits, flag, rows, heads,
            heads // kv_heads, count, single, scale - single, *q.stride()[:3], D=head_dim, ROTATE=rotate, **shape,
        )  # fmt: skip
    return Int8Queries(codes, unit, logits, *ordered), flag
