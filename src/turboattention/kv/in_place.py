"""Growth in place: for kernels that write new tokens into a cache's tail buffer, and compress blocks, by themselves.

A backend keeps what it needs for that in `KVCache.backend_state`, asks here what fits, writes, and calls `extend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .cache import KVCache
from .window import first_kept_blocks, tokens_seen

S = TypeVar("S")


def backend_state_of(cache: KVCache, kind: type[S]) -> S | None:
    """The state that a backend with states of this kind keeps over a cache; None without one, or if it is out of
    date."""
    state, table = cache.backend_state, cache.page_table
    if state is None or table is None or not isinstance(state, kind) or state.addresses is not table.addresses():
        return None
    return state


def room(cache: KVCache) -> int:
    """Tokens that can be added to every sequence before its tail buffer is full, or before the first block fills, from
    which the mean of K is computed. 0 before the first tokens."""
    if cache.tail is None or not cache.batch_size:
        return 0
    size = cache.config.block_size
    left = cache.tail.capacity - (cache.lengths - cache.page_counts * size)
    if cache.learns_mean:
        left = torch.where(cache.lengths < size, torch.minimum(left, size - 1 - cache.lengths), left)
    return int(left.min())


def settled(cache: KVCache) -> bool:
    """Whether the next block of every sequence can be compressed without decisions: widths and means are fixed, and all
    sink blocks are pages."""
    if not cache.frozen or not cache.batch_size:
        return False
    past_sinks = int(cache.page_counts.min()) >= cache.sink_blocks
    return past_sinks and int(cache.lengths.min()) >= cache.config.block_size


def tail_rows(cache: KVCache, tokens: int) -> int:
    """Rows of the tail buffer (`TailBuffer.memory`) for at most `tokens` buffered tokens per sequence."""
    assert cache.tail is not None
    return cache.tail.rows_for(tokens, tokens_seen(cache.lengths, cache.window_size))


def extend(
    cache: KVCache,
    tokens: int | Tensor,
    filled: Sequence[int] = (),
    pages: Sequence[int] = (),
    k_mean: Tensor | None = None,
) -> None:
    """Count tokens whose rows the caller wrote behind those in the tail buffer. To be called in the package's own modes
    (`turboattention.modes`).

    tokens: per sequence, int64 [B] (CPU) or one int for all; at most `room`, except in sequences that filled a block.
    filled, pages: those sequences, and the page (`PageTable.fresh_pages`) into which the caller compressed each one's
    block; the buffer holds the rows after it. k_mean: bfloat16 [B, H, D], the new mean if first blocks filled and it is
    not calibrated. If the cache is not `settled`, the caller has frozen the widths.
    """
    assert cache.page_table is not None
    if filled:
        cache.page_table.adopt(filled, pages)
    if k_mean is not None:
        cache.k_mean = k_mean
    cache.lengths = cache.lengths + tokens
    if cache.window_size is not None:
        first = first_kept_blocks(cache.lengths, cache.window_size, cache.config.block_size)
        cache.page_table.evict(first.tolist())
