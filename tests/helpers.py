"""Small things that many tests share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that do not depend on which tests ran before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, seed: int = 0, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, Lq, D] and k, v [B, Hkv, Lk, D]."""
    q = normals(batch, heads, queries, head_dim, seed=3 * seed, dtype=dtype)
    k = normals(batch, kv_heads, keys, head_dim, seed=3 * seed + 1, dtype=dtype)
    v = normals(batch, kv_heads, keys, head_dim, seed=3 * seed + 2, dtype=dtype)
    return q, k, v


def bits_of(x: Tensor) -> Tensor:
    """A float32 tensor's bits, to compare zeros, signs and NaN too."""
    return x.contiguous().view(torch.int32)
