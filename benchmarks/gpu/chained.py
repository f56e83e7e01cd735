"""Chained INT8 products alone, as attention makes them: weights from one product are the first operand of the next."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from problem import device
from torch import Tensor

BLOCKS, PROGRAMS, SHIFT = 5, 3, 10


@triton.jit
def _chained(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Grid (tiles of M rows): q int8 [tiles, M, D], k int8 [blocks, 64, D], v int8 [blocks, D, 64] -> out int32 [tiles,
    M, D]. Weights are products shifted by BITS and cut off at 127."""
    row, d, t = tl.arange(0, M), tl.arange(0, D), tl.arange(0, 64)
    at = tl.program_id(0) * (M * D) + row[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at)
    acc = tl.zeros((M, D), tl.int32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        k = tl.load(k_ptr + block * (64 * D) + t[None, :] * D + d[:, None])
        s = tl.dot(q, k, out_dtype=tl.int32) >> BITS
        p = tl.minimum(tl.maximum(s, -127), 127).to(tl.int8)
        v = tl.load(v_ptr + block * (64 * D) + d[None, :] * 64 + t[:, None])
        acc += tl.dot(p, v, out_dtype=tl.int32)
    tl.store(out_ptr + at, acc)


def check(rows: int, head_dim: int, warps: int, stages: int) -> None:
    """Raises AssertionError unless the products are exact."""
    generator = torch.Generator().manual_seed(1)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device())

    q, k, v = codes(PROGRAMS, rows, head_dim), codes(BLOCKS, 64, head_dim), codes(BLOCKS, head_dim, 64)
    out = torch.empty(q.shape, dtype=torch.int32, device=q.device)
    _chained[(PROGRAMS,)](q, k, v, out, BLOCKS, M=rows, D=head_dim, BITS=SHIFT, STAGES=stages, num_warps=warps)
    # Sums of float64 are exact here.
    products = torch.einsum("pmd,btd->pbmt", q.double(), k.double()).long() >> SHIFT
    want = torch.einsum("pbmt,bdt->pmd", products.clamp(-127, 127).double(), v.double()).to(torch.int32)
    assert torch.equal(out, want), f"{int((out != want).sum())} of {want.numel()} differ"
