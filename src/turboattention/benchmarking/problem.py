"""The inputs of a benchmark: shapes, random tensors, and a cache with these tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kv.cache import KVCache
from .gate import Expected, expect

_CHUNK = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call; decode has one query. window: keys that the next query sees; None for all."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool = False
    batch: int = 1
    window: int | None = None

    @property
    def operations(self) -> int:
        """Multiplications and additions of both matrix products, without the masked part."""
        pairs = self.queries * self.keys
        if self.causal:
            pairs -= self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * self.head_dim * pairs


@dataclass(frozen=True)
class Problem:
    """Random q [B, Hq, Lq, D] and k, v [B, Hkv, Lk, D], and for decode a cache with the same k, v."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    cache: KVCache | None = None

    @cached_property
    def expected(self) -> Expected:
        """Exact attention over the input keys and values."""
        return expect(self.q, self.k, self.v, self.shape.causal)

    @cached_property
    def expected_stored(self) -> Expected:
        """Exact attention over the stored keys and values, from which only the kernel's own error remains."""
        assert self.cache is not None
        return expect(self.q, *self.cache.dequantize(), self.shape.causal)

    def with_cache(self, config: TurboConfig) -> Problem:
        return replace(self, cache=fill(self.k, self.v, config))


def make_problem(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator).to(dtype)

    return Problem(
        shape, draw(shape.heads, shape.queries), draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)
    )


def fill(k: Tensor, v: Tensor, config: TurboConfig, **options: Any) -> KVCache:
    """A cache filled with k, v [B, Hkv, L, D] in chunks."""
    cache = KVCache(k.shape[0], k.shape[1], k.shape[3], config=config, **options)
    for at in range(0, k.shape[2], _CHUNK):
        cache.append(k[:, :, at : at + _CHUNK], v[:, :, at : at + _CHUNK])
    return cache
