"""Decode steps of backend "cpu": attention and storing in one call of the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...kernels.cpu.attention import refusal
from ...kernels.cpu.step import LARGEST, Step
from ...kv.cache import KVCache
from ...kv.in_place import backend_state_of, extend, room, settled, tail_rows
from ...params import AttentionParams
from ...validation import check_finite
from ..inputs import pages_of
from . import prompts
from .groups import blocks_filled


def step(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    params: AttentionParams,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attend and append in one call, if no sequence fills more than one block. Shapes are checked.

    q: [B, Hq, Lq, D]; k, v: [B, Hkv, Lq, D] or None. Returns out and lse, or None if the call needs the general path;
    the cache is then unchanged, as it is if NonFiniteError is raised.
    """
    tokens = k.shape[2] if k is not None else 0
    if counts is not None or params.attn_mask is not None or (k is not None and q.shape[2] != tokens):
        return None
    if q.shape[2] > 1 and not cache.config.token_scales:
        return None  # the rows of a tile of queries share a scale
    steps = _steps_of(cache)
    filled = steps.filled_by(tokens) if steps is not None else None
    if steps is None or filled is None:
        return None
    steps.fit(cache, tokens, filled)
    pages, fresh = steps.fresh(cache, filled)
    try:
        result = steps.step.run(q, k, v, cache.lengths, fresh, params)
    except NonFiniteError:
        steps.discard(cache, pages)
        for name, x in (("k_new", k), ("v_new", v), ("q", q)):
            if x is not None:
                check_finite(name, x)  # reports which values
        raise
    if tokens:
        steps.count(cache, tokens, filled, pages)
    return result


def append(cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None = None) -> bool:
    """`kv.quantizer.Quantizer.append`."""
    tokens = k.shape[2]
    if counts is not None or refusal(cache.config, k.dtype) or not tokens:
        return False
    steps = _steps_of(cache)
    filled = steps.filled_by(tokens) if steps is not None else None
    if steps is None or filled is None:
        return prompts.append(cache, k, v)
    steps.fit(cache, tokens, filled)
    pages, fresh = steps.fresh(cache, filled)
    try:
        steps.step.append(k, v, cache.lengths, fresh)
    except NonFiniteError:  # the general path names the values
        steps.discard(cache, pages)
        return False
    steps.count(cache, tokens, filled, pages)
    return True


class _Steps:
    """State of successive steps over a cache; invalid after any other change of the cache."""

    def __init__(self, cache: KVCache):
        self._room, self._capacity = room(cache), cache.config.block_size - 1 + cache.config.flush_lag
        self._may_fill = settled(cache) and not cache.config.flush_lag
        assert cache.page_table is not None
        self.addresses = cache.page_table.addresses()
        self._pages, self._start = pages_of(cache), cache.page_counts * cache.config.block_size
        self._tail_lengths = (cache.lengths - self._start).tolist()
        self._universal = None if cache.universal is None else cache.universal.contiguous()
        self._began = int(cache.lengths.min()) > 0  # the first tokens decide the universal scales
        self._size, self._stored = cache.config.block_size, cache.config.stored_prefill
        state = cache.state(torch.device("cpu"))
        self._mean, self._order = None if state.k_mean is None else state.k_mean.contiguous(), cache.k_order
        self._rows = 0
        self.fit(cache, 0, [])

    def fit(self, cache: KVCache, tokens: int, filled: list[int]) -> None:
        """Resize the buffer for `tokens` more tokens per sequence; sequences in `filled` fill a block with them."""
        held = max(self._tail_lengths)
        if not filled and tokens and held + tokens <= self._rows:
            return
        left = [rows + tokens for rows in self._tail_lengths]
        for sequence in filled:
            left[sequence] -= self._size
        rows = tail_rows(cache, max(held, *left))  # rows of a block that fills are read from the buffer
        if rows != self._rows:
            self._rows = rows
            assert cache.tail is not None
            codes, scales = cache.tail.memory(rows)
            self.step = Step(
                cache.config,
                self._pages,
                self._start,
                codes,
                scales,
                self._mean,
                cache.mean_from,
                self._order,
                self._universal,
            )

    def filled_by(self, tokens: int) -> list[int] | None:
        """Sequences that fill a block with `tokens` more tokens; None if that needs the general path."""
        if self._universal is not None and (not self._began or tokens >= self._size):
            return None  # a block of new tokens only gets its own scales
        if tokens <= self._room:
            return []
        if not self._may_fill or tokens > LARGEST:
            return None
        if self._stored and max(self._tail_lengths) + tokens > self._size:
            return None  # later rows must read the filled block from its page, which a step writes last
        return [b for b, rows in enumerate(self._tail_lengths) if blocks_filled(rows, tokens)]

    def fresh(self, cache: KVCache, filled: list[int]) -> tuple[list[int], Tensor | None]:
        """Pages for the blocks that the sequences in `filled` fill, and their addresses int64 [B, 1] (0 for others)."""
        if not filled:
            return [], None
        table = cache.page_table
        assert table is not None
        pages = table.fresh_pages([1] * len(filled))
        addresses = [[0]] * len(self._tail_lengths)
        for sequence, page in zip(filled, pages, strict=True):
            addresses[sequence] = [table.page_address(page)]
        return pages, torch.tensor(addresses)

    def discard(self, cache: KVCache, pages: list[int]) -> None:
        if pages:
            assert cache.page_table is not None
            cache.page_table.discard(pages)

    def count(self, cache: KVCache, tokens: int, filled: list[int], pages: list[int]) -> None:
        """Update lengths and counts after a step."""
        extend(cache, tokens, filled, pages)
        self._room -= tokens
        self._tail_lengths = [rows + tokens for rows in self._tail_lengths]
        if filled:
            assert self._pages is not None
            for sequence in filled:
                self._tail_lengths[sequence] -= self._size
                self._start[sequence] += self._size
                self._pages.counts[sequence] += 1
            self._room = self._capacity - max(self._tail_lengths)
            self.fit(cache, 0, [])


def _steps_of(cache: KVCache) -> _Steps | None:
    """The cache's `_Steps`, new if something else changed the cache; None for caches without such steps."""
    if cache.page_table is None or cache.dtype is None or not cache.batch_size:
        return None
    steps = backend_state_of(cache, _Steps)
    if steps is None:
        cache.backend_state = steps = _Steps(cache)
    return steps
