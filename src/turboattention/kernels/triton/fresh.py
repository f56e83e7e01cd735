"""Stage 1 of new keys and values directly into the operand blocks that `prefill` reads.

Bit-identical to `quantize_tokens`, `first_block_mean` and `unpack_rows` in sequence, but without intermediate INT8
rows and without waiting for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import float_rows
from .configs import EXACT
from .rows import rounded_mean, stage_rows
from .softmax import LEVELS
from .unpacked_kv import largest_of, value_column


@triton.jit(do_not_specialize=["heads"])
def first_mean(
    k_ptr, mean_ptr, flag_ptr, heads, stride_b, stride_h, stride_t,
    SKIPPED: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences x KV heads): mean bfloat16 [B, Hkv, D] of INT8 keys SKIPPED to 63."""
    tile = tl.program_id(0)
    base = (tile // heads).to(tl.int64) * stride_b + (tile % heads).to(tl.int64) * stride_h
    total = tl.zeros((WIDE,), tl.float64)
    for part in tl.static_range(64 // ROWS):
        row = part * ROWS + tl.arange(0, ROWS)
        offsets = base + row.to(tl.int64) * stride_t
        codes, scale = stage_rows(k_ptr, offsets, row >= 0, None, row, row < 0, flag_ptr, D, ROWS, WIDE, ROTATE)
        # Products of codes and scales with 4 mantissa bits sum exactly in float64, in any order.
        exact = codes.to(tl.float64) * tl.where(row >= SKIPPED, scale, 0.0).to(tl.float64)[:, None]
        total += tl.sum(exact, 0)
    count = tl.full((WIDE,), 64 - SKIPPED, tl.float64)
    d = tl.arange(0, WIDE)
    tl.store(mean_ptr + tile.to(tl.int64) * D + d, rounded_mean(total, count), mask=d < D)


@triton.jit(do_not_specialize=["tokens", "kv_heads", "first_head", "heads", "first_sequence"])
def unpack_fresh(
    k_in, v_in, mean_ptr, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr, flag_ptr,
    tokens, kv_heads, first_head, heads, first_sequence, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, V_WIDE: tl.constexpr, ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, `heads` KV heads from first_head on, 2 x sequences from first_sequence on: K and V alternate).

    Writes K and V as described in `unpacked_kv`. mean: bfloat16 [B, Hkv, D], subtracted from keys after the first
    block, or None."""
    block, side = tl.program_id(0), tl.program_id(2) % 2
    b, h = first_sequence + tl.program_id(2) // 2, first_head + tl.program_id(1)
    at = (((tl.program_id(2) // 2) * heads + tl.program_id(1)) * tl.num_programs(0) + block).to(tl.int64)
    d = tl.arange(0, WIDE)
    c = tl.arange(0, V_WIDE)
    for part in tl.static_range(64 // ROWS):
        row = part * ROWS + tl.arange(0, ROWS)
        t = block * 64 + row
        there = t < tokens
        tile = tl.zeros_like(row) + (b * kv_heads + h)
        if side == 0:
            offsets = b.to(tl.int64) * k_stride_b + h.to(tl.int64) * k_stride_h + t.to(tl.int64) * k_stride_t
            codes, scale = stage_rows(k_in, offsets, there, mean_ptr, tile, t >= 64, flag_ptr, D, ROWS, WIDE, ROTATE)
            tl.store(k_ptr + at * (64 * WIDE) + row[:, None] * WIDE + d[None, :], codes)
            tl.store(k_scale_ptr + at * 64 + row, tl.where(there, scale, 0.0))
        else:
            offsets = b.to(tl.int64) * v_stride_b + h.to(tl.int64) * v_stride_h + t.to(tl.int64) * v_stride_t
            rows, scale = stage_rows(v_in, offsets, there, None, tile, there, flag_ptr, DV, ROWS, V_WIDE, ROTATE)
            tl.store(v_ptr + at * (64 * V_WIDE) + c[:, None] * 64 + value_column(row)[None, :], tl.trans(rows))
            tl.store(v_level_ptr + at * 64 + row, tl.where(there, scale, 0.0))
    if side == 1:
        tl.debug_barrier()  # all scales are written
        token = tl.arange(0, 64)
        scales = tl.load(v_level_ptr + at * 64 + token)
        largest = largest_of(scales)
        tl.debug_barrier()  # all scales are read
        tl.store(v_level_ptr + at * 64 + token, scales / largest * LEVELS)
        tl.store(v_scale_ptr + at, largest)


def mean_of_first_block(k: Tensor, skipped: int, wide: int, rotate: bool, flag: Tensor) -> Tensor:
    """The mean of INT8 keys `skipped` to 63 of k [B, Hkv, L, D], L >= 64: bfloat16 [B, Hkv, D].

    flag: as in `quantize.quantize_queries`. Raises DtypeError."""
    k = float_rows(k)
    batch, heads, _, head_dim = k.shape
    mean = torch.empty(batch, heads, head_dim, dtype=torch.bfloat16, device=k.device)
    first_mean[(batch * heads,)](
        k,
        mean,
        flag,
        heads,
        *k.stride()[:3],
        SKIPPED=skipped,
        ROTATE=rotate,
        D=head_dim,
        WIDE=wide,
        **_rows(wide),
    )
    return mean


def quantize_and_unpack(
    new: tuple[Tensor, Tensor],
    mean: Tensor | None,
    rotate: bool,
    flag: Tensor,
    sequences: range,
    heads: range,
    unpacked: tuple[Tensor, ...],
) -> None:
    """Quantize k [B, Hkv, L, D], v [B, Hkv, L, Dv] of these sequences and KV heads into `unpacked`.

    rotate: whether to rotate K and V. mean: bfloat16 [B, Hkv, D] or None. flag: as in `quantize.quantize_queries`.
    Raises DtypeError."""
    k, v = map(float_rows, new)
    wide, v_wide = unpacked[0].shape[4], unpacked[1].shape[4]
    unpack_fresh[unpacked[0].shape[2], len(heads), 2 * len(sequences)](
        k, v, mean, *unpacked, flag, k.shape[2], k.shape[1], heads.start, len(heads), sequences.start,
        *k.stride()[:3], *v.stride()[:3], ROTATE=rotate, D=k.shape[3], WIDE=wide, DV=v.shape[3], V_WIDE=v_wide,
        **_rows(max(wide, v_wide)),
    )  # fmt: skip


def _rows(wide: int) -> dict[str, int | bool]:
    return {"ROWS": min(64, 4096 // wide), "num_warps": 4, **EXACT}
