"""Stage 1 with smoothing and rotation fused, the rotation undone, and the mean of the first block.

Each launcher has the arguments, the meaning and the results, to the last bit, of its namesake in
`kernels.cpu.quantize`. Index tensors may be on the CPU or on the device.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import DtypeError
from .rotation import rotate, rotate_back
from .rounding import bits_of, float_of, nearest_int8

_LARGEST = tl.constexpr(0x5D5E0B6B)  # the bits of 1e18: values beyond it are refused
_SMALLEST_SCALE = tl.constexpr(2.0**-100)

TOKEN_SCALES = (torch.float32, torch.bfloat16)
"""Both hold a token's scale, of 4 mantissa bits, exactly."""

NOT_FINITE = 1
"""What a kernel writes into a flag (int32 [1]) where a row holds what is not finite or beyond 1e18."""

# Products must not be fused with sums: results would no longer be those of the other backends.
EXACT = {"enable_fp_fusion": False}


# -- what other kernels use too -------------------------------------------------------------------------


@triton.jit
def load_rows(x, offsets, wanted, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D channels at `offsets` (int64 [ROWS]) as float32 [ROWS, WIDTH], and which of them are
    finite and in range. The others, and those not wanted, are zeros; the latter are not read."""
    channel = tl.arange(0, WIDTH)[None, :]
    rows = tl.load(x + offsets[:, None] + channel, mask=wanted[:, None] & (channel < D), other=0.0).to(tl.float32)
    # Magnitudes' bits order like the magnitudes and put NaN and infinity on top.
    fine = tl.max(bits_of(rows) & 0x7FFFFFFF, 1) <= _LARGEST
    return tl.where(fine[:, None], rows, 0.0), fine


@triton.jit
def tell(flag, fine):
    """Raise the flag unless every row is fine."""
    bad = tl.max((~fine).to(tl.int32), 0)
    tl.store(flag, 1, mask=bad > 0)


@triton.jit
def token_codes(x, GRID: tl.constexpr):
    """float32 [ROWS, WIDTH] -> int8 codes and a scale for every row: on the grid of 4 mantissa bits or exact."""
    scale = tl.div_rn(float_of(tl.max(bits_of(x) & 0x7FFFFFFF, 1)), 119.0)
    if GRID:
        scale = float_of((bits_of(scale) + 0x7FFFF) & -0x80000)
    scale = tl.where(scale == 0.0, 1.0, tl.maximum(scale, _SMALLEST_SCALE))
    return nearest_int8(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))), scale


@triton.jit
def stage_rows(
    x,
    offsets,
    wanted,
    mean,
    mean_row,
    smoothed,
    flag,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Rows at `offsets`, rotated, those `smoothed` less row `mean_row` of `mean` -> codes and scales.

    A row that is not finite gives zeros and raises the flag."""
    rows, fine = load_rows(x, offsets, wanted, D, WIDTH)
    tell(flag, fine)
    if ROTATE:
        rows = rotate(rows, ROWS, WIDTH, D & -D)
    if mean is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        taken = (wanted & fine & smoothed)[:, None] & (channel < D)
        rows = rows - tl.load(mean + mean_row.to(tl.int64)[:, None] * D + channel, mask=taken, other=0.0)
    return token_codes(rows, True)


@triton.jit
def store_codes(codes, row, wanted, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of `codes` (contiguous, D channels) at `row` (int64 [ROWS])."""
    channel = tl.arange(0, WIDTH)[None, :]
    tl.store(codes + row[:, None] * D + channel, values, mask=wanted[:, None] & (channel < D))


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
) -> bool:
    """Rotate, smooth and quantize tokens `span[0][b] .. span[1][b]` of each sequence of x [B, H, T, D].

    Token t stands at position `first[b] + t`; from `mean_from` on, mean [B, H, D] is subtracted. Its
    row goes to row `target[b] + t` of codes int8 [B, H, W, D] and scales float32 [B, H, W], both
    contiguous. The others of x are never read, the others of the result never written. All of span,
    first and target are int64 [B].

    Returns whether all values read were finite and at most 1e18 in magnitude, which waits for the
    device. Raises DtypeError.
    """
    batch, heads, tokens, head_dim = x.shape
    if not x.numel():
        return True
    x = float_rows(x)
    check_tiles(codes, scales)
    begin, end, first, target = (indices(i, x) for i in (*span, first, target))
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    rows = batch * heads * tokens
    shape = row_shape(rows, head_dim)
    _tokens_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        x, begin, end, first, target, means(mean), codes, scales, flag, rows, heads, tokens, codes.shape[2],
        mean_from, *x.stride()[:3], D=head_dim, ROTATE=rotate, **shape,
    )  # fmt: skip
    return not bool(flag)


# -- queries --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "heads", "group", "count", "scale", "scale_rest"])
def _queries_kernel(
    q,
    valid,
    mean,
    codes,
    units,
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
    tell(flag, fine)
    if ROTATE:
        x = rotate(x, ROWS, WIDTH, D & -D)
    values, unit = token_codes(x, False)
    to = row.to(tl.int64)
    store_codes(codes, to, there, values, D, WIDTH)
    tl.store(units + to, unit * scale, mask=there)
    if mean is not None:
        channel = tl.arange(0, WIDTH)[None, :]
        mean_row = (head // group).to(tl.int64)
        mu = tl.load(mean + mean_row[:, None] * D + channel, mask=there[:, None] & (channel < D), other=0.0)
        product = tl.sum(x.to(tl.float64) * mu.to(tl.float64), 1)
        # A float argument of a kernel is float32: the rest of the scale makes it float64.
        wide = tl.full([], scale, tl.float64) + tl.full([], scale_rest, tl.float64)
        tl.store(mean_logits + to, (wide * product).to(tl.float32), mask=there)


def quantize_queries(
    q: Tensor,
    kv_heads: int,
    valid: Tensor,
    mean: Tensor | None,
    scale: float,
    rotate: bool,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """q [B, Hq, Lq, D] -> codes int8 [B, Hkv, g, Lq, D], unit float32 [B, Hkv, g, Lq] (a row's scale
    times `scale`), mean_logit likewise (`scale q . mean`; None without mean [B, Hkv, D]), and a flag
    int32 [1] on the device (`flag`, where given), which becomes 1 where a row read is not finite or
    beyond 1e18 in magnitude; such a row counts as zeros. Nothing waits for the device.

    Rows from `valid[b]` on (int64 [B]) are never read and count as zeros. Raises DtypeError.
    """
    batch, heads, count, head_dim = q.shape
    q = float_rows(q)
    codes = torch.empty(batch, kv_heads, heads // kv_heads, count, head_dim, dtype=torch.int8, device=q.device)
    unit = torch.empty(codes.shape[:-1], dtype=torch.float32, device=q.device)
    logits = None if mean is None else torch.empty_like(unit)
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    rows = batch * heads * count
    if rows:
        shape, single = row_shape(rows, head_dim), float(np.float32(scale))
        _queries_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            q, indices(valid, q), means(mean), codes, unit, logits, flag, rows, heads, heads // kv_heads, count,
            single, scale - single, *q.stride()[:3], D=head_dim, ROTATE=rotate, **shape,
        )  # fmt: skip
    return codes, unit, logits, flag


# -- back -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "heads", "tokens"])
def _restore_kernel(
    x,
    out,
    rows,
    heads,
    tokens,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, t = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    channel = tl.arange(0, WIDTH)[None, :]
    there = (row < rows)[:, None] & (channel < D)
    values = tl.load(x + row.to(tl.int64)[:, None] * D + channel, mask=there, other=0.0)
    if ROTATE:
        values = rotate_back(values, ROWS, WIDTH, D & -D, True)
    to = (tile // heads) * stride_b + (tile % heads) * stride_h + t * stride_t
    tl.store(out + to[:, None] + channel, values.to(out.dtype.element_ty), mask=there)


def restore_rows(x: Tensor, dtype: torch.dtype, rotate: bool, out: Tensor | None = None) -> Tensor:
    """float32 [B, H, T, D], rotated back if `rotate`, as `dtype`; into `out` (any strides but the
    last, which is 1) if given. Raises DtypeError."""
    x = x.to(torch.float32).contiguous()
    _, heads, tokens, head_dim = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if float_rows(out) is not out:
        raise DtypeError(f"out: expected channels side by side, got strides {out.stride()}")
    rows = x.numel() // head_dim
    if rows:
        shape = row_shape(rows, head_dim)
        _restore_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            x, out, rows, heads, tokens, *out.stride()[:3], D=head_dim, ROTATE=rotate, **shape
        )
    return out


# -- the mean of the first block ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["begin", "end", "heads", "width"])
def _mean_kernel(
    codes, scales, wanted, mean, begin, end, heads, width, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + tile // heads) != 0:
        channel = tl.arange(0, WIDTH)
        # Codes times scales of 4 mantissa bits sum exactly in float64, in whatever order.
        total = tl.zeros((WIDTH,), tl.float64)
        for at in range(begin, end, ROWS):
            row = at + tl.arange(0, ROWS)
            there = row < end
            row = tile * width + row
            scale = tl.load(scales + row, mask=there, other=0.0).to(tl.float64)
            code = tl.load(codes + row[:, None] * D + channel, mask=there[:, None] & (channel < D)[None, :], other=0)
            total += tl.sum(code.to(tl.float64) * scale[:, None], 0)
        # Its inverse would not do: this is rounded once.
        count = (end - begin).to(tl.float64) + tl.zeros((WIDTH,), tl.float64)
        tl.store(mean + tile * D + channel, (total / count).to(tl.float32), mask=channel < D)


def first_block_mean(codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor) -> Tensor:
    """float32 [B, H, D]: `mean`, but for the sequences `wanted` (bool [B]) the mean of their rows `begin`
    to `end` (exclusive) of codes [B, H, W, D] under scales [B, H, W], float32 or bfloat16. Raises DtypeError."""
    mean = mean.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    batch, heads, width, head_dim = codes.shape
    check_tiles(codes, scales, TOKEN_SCALES)
    if batch * heads:
        _mean_kernel[(batch * heads,)](
            codes, scales, indices(wanted, codes), mean, begin, end, heads, width,
            D=head_dim, ROWS=8, WIDTH=triton.next_power_of_2(head_dim), **EXACT,
        )  # fmt: skip
    return mean


# -- arguments ------------------------------------------------------------------------------------------


def float_rows(x: Tensor) -> Tensor:
    """Float rows of any strides, channels side by side: a copy where they lie apart."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DtypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    return x if x.stride(-1) == 1 else x.contiguous()


def means(mean: Tensor | None) -> Tensor | None:
    return None if mean is None else mean.to(torch.float32).contiguous()


def indices(x: Tensor, beside: Tensor) -> Tensor:
    return x.to(beside.device, torch.int64).contiguous()


def check_tiles(codes: Tensor, scales: Tensor, scale_dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """codes [B, H, W, D] and scales [B, H, W] as the kernels take them."""
    if codes.dtype != torch.int8 or scales.dtype not in scale_dtypes:
        raise DtypeError(f"codes, scales: expected int8 and {scale_dtypes}, got {codes.dtype} and {scales.dtype}")
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise DtypeError("codes, scales: expected contiguous tensors, got others")


def row_shape(rows: int, head_dim: int) -> dict[str, int]:
    """How many rows a program takes: up to 32 values a thread, or 16 where few rows must keep all
    processors busy (decode)."""
    width = triton.next_power_of_2(head_dim)
    values, warps = (min(32 * width, 4096), 4) if rows > 4096 else (512, 1)
    return {"ROWS": max(values // width, 1), "WIDTH": width, "num_warps": warps, **EXACT}
