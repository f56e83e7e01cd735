"""Adds the tokens of a call to a cache: stage them as INT8, encode the blocks that fill, commit.

Staging and encoding do not change what the cache holds, and committing cannot fail because of the input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..modes import in_own_modes
from .compression import Compression, Encoded
from .page_table import PageTable
from .quantizer import TokenQuantizer
from .stage1 import Stage
from .stage1 import stage as stage_tokens
from .tail_buffer import TailBuffer
from .window import first_kept_blocks, tokens_seen

if TYPE_CHECKING:
    from .cache import KVCache


@in_own_modes
def stage(
    cache: KVCache,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    query_energy: Tensor | None = None,
    names: tuple[str, str] = ("k", "v"),
    quantizer: TokenQuantizer | None = None,
) -> Stage:
    """Quantize the first `counts[b]` new tokens (int64 [B], CPU; None for all) of k [B, Hkv, T, D] and v [B, Hkv, T,
    Dv] to INT8. Shapes are checked.

    query_energy: float64 [Hkv, D] of the queries of this call (`channel_order`). names: of k and v in messages.
    quantizer: the device's by default. Raises NonFiniteError.
    """
    counts = token_counts(counts, cache.batch_size, k.shape[2])
    cache.look()
    staged = stage_tokens(cache.config, cache.state(k.device), k, v, counts, names, quantizer)
    allocate(cache, k.device)
    if cache.dtype is None:
        cache.dtype = k.dtype
    return replace(staged, query_energy=_sum(cache.query_energy, query_energy))


def token_counts(counts: Tensor | None, batch: int, tokens: int) -> Tensor:
    """int64 [B] (CPU): how many of `tokens` new tokens each sequence takes; all without `counts`."""
    return torch.full((batch,), tokens) if counts is None else counts


def allocate(cache: KVCache, device: torch.device) -> None:
    """Allocate the memory of a cache that has none yet."""
    if cache.page_table is not None:
        return
    device = torch.empty(0, device=device).device  # "cuda" means the current one: tensors name it
    c, (batch, heads, head_dim, v_head_dim) = cache.config, cache.token_shape
    state, capacity = cache.state(device), c.block_size - 1 + c.flush_lag
    cache.k_mean, cache.universal = state.k_mean, state.universal
    cache.tail = TailBuffer(batch, heads, capacity, head_dim, c.token_scales, device, v_head_dim)
    cache.page_table = PageTable(c, batch, heads, head_dim, device, cache.window_size is not None, v_head_dim)


def encode(cache: KVCache, compression: Compression) -> list[Encoded]:
    """Encode full blocks of a stage of this cache."""
    assert cache.page_table is not None
    return cache.page_table.pools.encode(compression)


@in_own_modes
def commit(cache: KVCache, staged: Stage, compression: Compression) -> None:
    """Store staged tokens; `compression`: of `staged` (`compression_of`)."""
    table, tail, size = cache.page_table, cache.tail, cache.config.block_size
    assert table is not None and tail is not None
    cache.backend_state = None
    flush, first = compression.flush, first_kept_blocks(staged.lengths, cache.window_size, size)
    seen = flush.block >= first[flush.batch]
    parts = encode(cache, compression.of(flush.where(seen)))
    if compression.decides:
        assert compression.head_bits is not None
        cache.freeze(compression.head_bits, compression.order)
    table.append(parts, first.tolist(), flush.batch[~seen].tolist())
    kept = torch.bincount(flush.batch, minlength=cache.batch_size) * size
    tail.take(staged.stored, kept, staged.lengths - staged.start - kept, tokens_seen(staged.lengths, cache.window_size))
    cache.lengths = staged.lengths.clone()
    cache.k_mean, cache.universal = staged.k_mean, _single(staged.universal)
    cache.query_energy = staged.query_energy if cache.learns_order else None


def observe(cache: KVCache, query_energy: Tensor) -> None:
    """Add `query_energy` float64 [Hkv, D] of a call that does not commit; used until K's order is fixed."""
    cache.query_energy = _sum(cache.query_energy, query_energy)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y.to(x.device)


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
