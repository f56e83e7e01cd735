"""Replaces the sequences of one cache by those of another, in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .window import tokens_seen

if TYPE_CHECKING:
    from .cache import KVCache


def take_sequences(cache: KVCache, source: KVCache, index: Tensor) -> None:
    """Sequence `i` of `cache` becomes sequence `index[i]` (int64 [B'], repeats allowed) of `source`, which may be the
    same cache. Pages are shared, unless memory was reserved and there are fewer sequences now, or the other sequences
    had most of the memory that these pages are in."""
    lengths, cache.backend_state = source.lengths[index], None
    if source.page_table is not None and source.tail is not None:
        table, tail = source.page_table.select(index.tolist()), source.tail.select(index)
        rows = lengths - table.counts * cache.config.block_size
        most = int(rows.max()) if len(rows) else 0
        tail.memory(tail.rows_for(most, tokens_seen(lengths, cache.window_size)))
        if len(index) < source.batch_size and table.pools.reserved_pages[1]:
            table.leave_pools(cache.max_tokens or 0, cache.window_size)
        at = index.to(table.device)
        cache.k_mean = None if source.k_mean is None else source.k_mean[at]
        cache.universal = None if source.universal is None else source.universal[:, at]
        cache.page_table, cache.tail = table, tail
    cache.lengths = lengths
