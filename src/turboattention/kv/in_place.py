"""Growth in place: for kernels that write new tokens into a cache's tail buffer, and compress blocks.

For steps, a backend keeps what it needs in `KVCache.backend_state`, asks here what fits, writes, and calls `extend`. A
prompt is written within `filling`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .cache import KVCache
from .compression import Compression
from .growth import allocate
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


def fills_at_once(cache: KVCache, tokens: int) -> bool:
    """Whether `filling` can take as many new tokens of every sequence: the blocks that fill are compressed at once, and
    each token has a scale that depends on no other."""
    config = cache.config
    return bool(tokens and cache.batch_size and config.token_scales and not config.flush_lag)


@dataclass(frozen=True)
class Decided:
    """What the first tokens of a call fix for all of them.

    k_mean: bfloat16 [B, H, D], or None without smoothing. compression: of these tokens; it has widths and order if it
    decides them.
    """

    k_mean: Tensor | None
    compression: Compression


def deciding_tokens(cache: KVCache, tokens: int, sampled: int = 0) -> int:
    """How many of `tokens` new tokens of every sequence decide its mean of K, or the cache's widths and order of K's
    channels; 0 if none of them is decided by these tokens.

    sampled: positions that the decision about widths looks at, in addition to the first compressed block.
    """
    size, ends = cache.config.block_size, cache.lengths + tokens
    means = cache.learns_mean and bool(((cache.lengths < size) & (ends >= size)).any())
    freezes = not cache.frozen and bool((ends // size > cache.sink_blocks).any())
    if not (means or freezes):
        return 0
    last = max((cache.sink_blocks + 1) * size, sampled) if freezes else size
    return min(tokens, last - int(cache.lengths.min()))


@dataclass(frozen=True)
class Filling:
    """Where the new tokens of a prompt go. pages: int64 [B, F], addresses for the blocks that fill, 0 for those that no
    later query can see, and after a sequence's last. codes, scales: of the tail buffer (`TailBuffer.memory`), which
    holds the tokens before the call, and receives those after the blocks that fill."""

    pages: Tensor
    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]


@contextlib.contextmanager
def filling(
    cache: KVCache, tokens: int, decided: Decided | None, device: torch.device, dtype: torch.dtype
) -> Iterator[Filling]:
    """Makes room for `tokens` more tokens of every sequence (`fills_at_once`), and counts them afterwards.

    The caller writes them, with the mean of K, the widths and the order that the cache has then. If it raises, the
    cache is unchanged.
    """
    allocate(cache, device)
    table, tail, size = cache.page_table, cache.tail, cache.config.block_size
    assert table is not None and tail is not None
    after, mean, rows = cache.lengths + tokens, cache.k_mean, tail.rows
    held, left = int((cache.lengths - table.counts * size).max()), int((after % size).max())
    seen = tokens_seen(after, cache.window_size)
    first = first_kept_blocks(after, cache.window_size, size).tolist()
    freezes = decided is not None and decided.compression.decides
    new: list[list[int]] = []
    try:
        if decided is not None:
            cache.k_mean = decided.k_mean
            if freezes:
                assert decided.compression.head_bits is not None
                cache.freeze(decided.compression.head_bits, decided.compression.order)
        new = table.next_pages((after // size - table.counts).tolist(), first)
        yield Filling(table.new_addresses(new), *tail.memory(tail.rows_for(max(held, left), seen)))
    except BaseException:
        tail.memory(rows)
        if new:
            table.give_back(new)
        cache.k_mean = mean
        if freezes:
            table.pools.thaw()
        raise
    table.extend(new, first)
    tail.memory(tail.rows_for(left, seen))
    cache.lengths, cache.backend_state = after, None
    cache.dtype = dtype if cache.dtype is None else cache.dtype
    if freezes:
        cache.query_energy = None
