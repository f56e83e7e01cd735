"""A peer: split-KV decode over a cache of floats (FlashDecoding's scheme), in plain Triton, at its best launch.

Reads a 16-bit cache, or one of 8-bit floats (e4m3, one scale a tensor) that is widened in registers.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, acc_ptr, row_max_ptr, row_sum_ptr, length, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid (splits, KV heads, sequences): acc float32 [B, H, splits, ROWS, D]; row_max, row_sum
    [B, H, splits, ROWS]."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    each = tl.cdiv(tl.cdiv(length, N), splits) * N
    row, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, N)
    q = tl.load(q_ptr + (head * GROUP + row)[:, None] * D + d[None, :], mask=(row < GROUP)[:, None], other=0.0)
    acc = tl.zeros((ROWS, D), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    k_ptr += head * length * D
    v_ptr += head * length * D
    for begin in range(split * each, tl.minimum(length, (split + 1) * each), N):
        there = begin + n < length
        at = (begin + n)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=there[:, None], other=0.0).to(q.dtype)
        s = tl.where(there[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        rescale = tl.exp2(row_max - new)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = tl.load(v_ptr + at, mask=there[:, None], other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * rescale[:, None])
        row_max = new
    at = (head * splits + split) * ROWS + row
    tl.store(acc_ptr + at[:, None] * D + d[None, :], acc)
    tl.store(row_max_ptr + at, row_max)
    tl.store(row_sum_ptr + at, row_sum)


@triton.jit
def _combine(
    acc_ptr, row_max_ptr, row_sum_ptr, out_ptr, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (query heads of a KV head, KV heads x sequences)."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (head * splits + s) * ROWS + row
    row_maxima = tl.load(row_max_ptr + at, mask=s < splits, other=float("-inf"))
    share = tl.exp2(row_maxima - tl.max(row_maxima, 0))
    row_sum = tl.sum(share * tl.load(row_sum_ptr + at, mask=s < splits, other=0.0), 0)
    acc = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    out = tl.sum(tl.where((share > 0.0)[:, None], acc, 0.0) * share[:, None], 0) / row_sum
    tl.store(out_ptr + (head * GROUP + row) * D + d, out.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Launch:
    """keys a step; warps; pipeline stages; programs of the launch per multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


LAUNCHES = tuple(
    Launch(*each) for each in itertools.product((64, 128), (4, 8), (2, 3, 4), (2, 4)) if each[:2] != (64, 8)
)


@functools.cache
def _processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1


def attend(q: Tensor, k: Tensor, v: Tensor, launch: Launch = LAUNCHES[0]) -> Tensor:
    """q [B, Hq, 1, D] over k, v [B, Hkv, L, D], contiguous, of q's dtype or float8_e4m3fn -> out like q."""
    batch, heads, _, head_dim = q.shape
    kv_heads, length = k.shape[1:3]
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))
    wanted = -(-launch.programs * _processors() // (batch * kv_heads))
    splits = max(1, min(wanted, -(-length // launch.keys), 128))
    acc = torch.empty(batch, kv_heads, splits, rows, head_dim, dtype=torch.float32, device=q.device)
    row_max, row_sum = (torch.empty(batch, kv_heads, splits, rows, device=q.device) for _ in range(2))
    out = torch.empty_like(q)
    scale = head_dim**-0.5 * 1.4426950408889634
    _split[splits, kv_heads, batch](
        q, k, v, acc, row_max, row_sum, length, scale, GROUP=group, ROWS=rows, D=head_dim, N=launch.keys,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    _combine[group, batch * kv_heads](
        acc, row_max, row_sum, out, splits, GROUP=group, ROWS=rows, D=head_dim, SPLITS=triton.next_power_of_2(splits)
    )
    return out
