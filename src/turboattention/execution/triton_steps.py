"""Backend "triton", step by step: what a decode step needs stands on the device, and nothing waits for it.

The host counts along. It knows how many tokens a step adds, and so which blocks fill and the pages they take;
lengths and page tables are never read back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import NonFiniteError
from ..kernels.triton.append import flush_blocks, store_tokens
from ..kernels.triton.attention import Int8Queries, OpenRows, Pages, Standing, attend, refusal
from ..kernels.triton.quantize import quantize_queries
from ..kv.cache import KVCache
from ..kv.growth import Growing
from .triton_device import on_own_device, upload

BLOCK = 64
"""Rows of a buffer that steps write into: a token that fills a block has room in front of its compression."""

_SPARE_COLUMNS = 64  # of a page table, when it is full


@dataclass(frozen=True)
class Call:
    """What stays the same from step to step of a layer."""

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None


def step(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor] | None:
    """A step in which no sequence goes past the block it is in: attends and appends (k and v may be None) for
    tensors whose shapes were checked. None where it is not such a step.

    Nothing waits for the device: values that are not finite become zeros, and a later call raises NonFiniteError.
    """
    tokens = k.shape[2] if k is not None else 0
    if k is not None and q.shape[2] != tokens:
        return None
    look(cache)
    steps = steps_of(cache)
    filled = steps.filled_by(tokens) if steps is not None else None
    if steps is None or filled is None:
        return None
    pages = steps.fresh(cache, filled)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    try:
        result = steps.run(q, k, v, Call(factor, is_causal, window_size, softcap), fills=bool(filled))
    except BaseException:
        steps.abandon(cache, pages)
        raise
    if tokens:
        steps.count(cache, tokens, filled, pages)
    flag_of(cache).send()
    return result


def append(cache: Growing, k: Tensor, v: Tensor) -> bool:
    """`kv.quantizer.Quantizer.append`."""
    tokens = k.shape[2]
    if refusal(cache.config, k.dtype) or not tokens:
        return False
    look(cache)
    steps = steps_of(cache)
    filled = steps.filled_by(tokens) if steps is not None else None
    if steps is None or filled is None:
        return False
    pages = steps.fresh(cache, filled)
    try:
        steps.store(k, v, fills=bool(filled))
    except BaseException:
        steps.abandon(cache, pages)
        raise
    steps.count(cache, tokens, filled, pages)
    flag_of(cache).send()
    return True


def pages_of(cache: Growing) -> Pages | None:
    """The cache's page tables for the kernels, moved to the device; None where it has no page."""
    store = cache.store
    if store is None or not bool(store.counts.any()):
        return None
    compressed = store.compressed.layout if store.compressed is not None else None
    addresses, counts = (x.to(store.device) for x in (store.addresses(), store.counts))
    return Pages(addresses, counts, store.sink_blocks, store.sinks.layout, compressed)


class Steps:
    """What steps of a cache share while nothing changes it but they: its state on the device, changed in
    place, and what the host counts beside it."""

    def __init__(self, cache: Growing):
        assert cache.store is not None
        self._store, self._config = cache.store, cache.config
        self._room, self._may_fill = cache.room, cache.settled
        self._capacity = cache.config.block_size - 1 + cache.config.flush_lag
        start = cache.page_counts * BLOCK
        self._open: list[int] = (cache.lengths - start).tolist()
        self._reserved: list[list[int]] = [[] for _ in self._open]
        self.addresses = cache.store.addresses()
        device = cache.store.device
        self.flag = flag_of(cache).on_device
        self._codes, self._scales = cache.buffer_memory(BLOCK)
        mean = cache.state(device).k_mean
        self._mean, self._mean_from = None if mean is None else mean.contiguous(), cache.mean_from
        self._lengths, self._start = (x.to(device, copy=True) for x in (cache.lengths, start))
        self._pages = pages_of(cache)
        if self._pages is not None:  # not the store's own table, which the host changes
            p = self._pages
            self._pages = Pages(p.addresses.clone(), p.counts.clone(), p.sink_blocks, p.sinks, p.compressed)

    # -- what the host knows ---------------------------------------------------------------------------

    def filled_by(self, tokens: int) -> list[int] | None:
        """Which sequences fill a block with so many tokens; None where that takes more than a step."""
        if max(self._open) + tokens > BLOCK or (tokens > self._room and not self._may_fill):
            return None
        filled = [b for b, rows in enumerate(self._open) if rows + tokens == BLOCK]
        return filled if self._may_fill or not filled else None

    def reserve(self, blocks: list[int]) -> None:
        """Pages for `blocks[b]` more blocks of each sequence: from now on the device finds them by itself."""
        assert self._pages is not None
        missing = [max(0, want - len(have)) for want, have in zip(blocks, self._reserved, strict=True)]
        pages = self._store.fresh_pages(sum(missing))
        for reserved, count in zip(self._reserved, missing, strict=True):
            reserved.extend(pages[:count])
            del pages[:count]
        # The table grows before it is captured by anything.
        counts = self._store.counts.tolist()
        width = max(count + len(reserved) for count, reserved in zip(counts, self._reserved, strict=True))
        table = self.addresses.new_zeros(len(counts), max(width, self.addresses.shape[1]))
        table[:, : self.addresses.shape[1]] = self.addresses
        assert self._store.compressed is not None
        for row, count, reserved in zip(table, counts, self._reserved, strict=True):
            row[count : count + len(reserved)] = torch.tensor(
                [self._store.compressed.address(page) for page in reserved], dtype=torch.int64
            )
        p = self._pages
        self._pages = Pages(table.to(p.addresses.device), p.counts, p.sink_blocks, p.sinks, p.compressed)

    def fresh(self, cache: Growing, filled: list[int]) -> list[int]:
        """Pages for the blocks that `filled` fill, their addresses in the device's table."""
        if not filled:
            return []
        missing = [b for b in filled if not self._reserved[b]]
        new = dict(zip(missing, self._store.fresh_pages(len(missing)), strict=True))
        try:
            self._enter(new)
        except BaseException:
            self.discard(list(new.values()))
            raise
        return [new[b] if b in new else self._reserved[b].pop(0) for b in filled]

    def _enter(self, pages: dict[int, int]) -> None:
        """A page of each of some sequences into the device's table, behind those that are there."""
        if not pages:
            return
        p, compressed = self._pages, self._store.compressed
        assert p is not None and compressed is not None
        if max(map(len, self._store.tables)) >= p.addresses.shape[1]:
            self._pages = p = replace(p, addresses=pad(p.addresses, (0, _SPARE_COLUMNS)))
        fresh = torch.zeros(len(self._open), dtype=torch.int64)
        for b, page in pages.items():
            fresh[b] = compressed.address(page)
        table, column = p.addresses, p.counts[:, None]
        fresh = upload(fresh, table.device)[:, None]
        table.scatter_(1, column, torch.where(fresh != 0, fresh, table.gather(1, column)))

    def discard(self, pages: list[int]) -> None:
        """Give back pages of a step that was not taken."""
        if pages:
            self._store.discard(pages)

    def abandon(self, cache: Growing, pages: list[int]) -> None:
        """Give back all pages after a step that failed: how far it came is unknown, so that the next call
        starts from what the host knows."""
        self.discard(pages)
        self.release()
        cache.kept = None

    def release(self) -> None:
        """Give back pages that were reserved and not filled."""
        for reserved in self._reserved:
            self.discard(reserved)
            reserved.clear()

    def count(self, cache: Growing, tokens: int, filled: list[int], pages: list[int]) -> None:
        """The step was taken."""
        cache.extend(tokens, filled, pages)
        self._room -= tokens
        self._open = [rows + tokens for rows in self._open]
        if filled:
            for b in filled:
                self._open[b] -= BLOCK
            self._room = self._capacity - max(self._open)

    # -- what the device does --------------------------------------------------------------------------

    @on_own_device
    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, call: Call, *, fills: bool) -> tuple[Tensor, Tensor]:
        """q [B, Hq, Lq, D] and new tokens k, v [B, H, T, D] -> out in q's dtype, lse float32 [B, Hq, Lq].

        `fills`: whether a block of some sequence may fill. Only device work, the same for every step: a CUDA
        graph may hold it.
        """
        tokens = 0 if k is None else k.shape[2]
        if k is not None and v is not None:
            self._write(k, v)
        lengths = self._lengths + tokens if tokens else self._lengths
        valid = torch.full_like(lengths, q.shape[2])
        kv_heads = self._codes[0].shape[1]
        codes, unit, logit, _ = quantize_queries(
            q, kv_heads, valid, self._mean, call.scale, self._config.rotate, self.flag
        )
        result = attend(
            self._config,
            q,
            Standing(lengths - q.shape[2], valid, lengths),
            self._pages,
            OpenRows(*self._codes, *self._scales, self._start),
            kv_heads=kv_heads,
            scale=call.scale,
            mean=self._mean,
            mean_from=self._mean_from // BLOCK,
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            mask=None,
            quantized=Int8Queries(codes, unit, logit),
        )
        if tokens:
            self._advance(tokens, fills)
        return result

    @on_own_device
    def store(self, k: Tensor, v: Tensor, *, fills: bool) -> None:
        """The new tokens alone."""
        self._write(k, v)
        self._advance(k.shape[2], fills)

    def copied(self) -> Steps:
        """The same sequences in memory of their own, to try a step on."""
        other = copy.copy(self)
        other._lengths, other._start, other.flag = (x.clone() for x in (self._lengths, self._start, self.flag))
        other._codes, other._scales = (tuple(x.clone() for x in pair) for pair in (self._codes, self._scales))
        p = self._pages
        if p is not None:
            other._pages = Pages(p.addresses, p.counts.clone(), p.sink_blocks, p.sinks, p.compressed)
        return other

    def _write(self, k: Tensor, v: Tensor) -> None:
        store_tokens(
            self._config,
            (k, v),
            self._lengths,
            self._start,
            self._mean,
            self._mean_from,
            self._codes,
            self._scales,
            self.flag,
        )

    def _advance(self, tokens: int, fills: bool) -> None:
        self._lengths += tokens
        if not fills:
            return
        p = self._pages
        assert p is not None and p.compressed is not None
        full = self._lengths - self._start == BLOCK
        column = p.counts.clamp(max=p.addresses.shape[1] - 1)[:, None]
        fresh = torch.where(full, p.addresses.gather(1, column)[:, 0], 0)
        flush_blocks(p.compressed, self._codes, self._scales, fresh, self._config.search)
        p.counts.add_(full)
        self._start.add_(full, alpha=BLOCK)


def steps_of(cache: Growing) -> Steps | None:
    """Those kept, or new ones where something else has changed the cache; None for caches that
    do not take steps."""
    if cache.store is None or cache.dtype is None or not cache.batch_size or not cache.config.token_scales:
        return None
    # Blocks that wait for a lag stay in the buffer longer than its BLOCK rows here have room for.
    if cache.config.flush_lag or refusal(cache.config, cache.dtype):
        return None
    kept = cache.kept
    if not isinstance(kept, Steps) or kept.addresses is not cache.store.addresses():
        cache.kept = kept = new_steps(cache)
    return kept


def new_steps(cache: Growing) -> Steps:
    """In place of those kept, which give back the pages they reserved."""
    if isinstance(cache.kept, Steps):
        cache.kept.release()
    return Steps(cache)


# -- what was not finite ------------------------------------------------------------------------------------


class _Flag:
    """`Growing.notice`: int32 [1] that kernels raise, and the host's copy, which arrives when it arrives."""

    def __init__(self, device: torch.device):
        self.on_device = torch.zeros(1, dtype=torch.int32, device=device)
        self._here = self.on_device
        if device.type != "cpu":
            self._here = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def copied(self) -> _Flag:
        """For a copy of the cache, which is to hear of it as well."""
        other = _Flag(self.on_device.device)
        other.on_device.copy_(self.on_device)
        other.send()
        return other

    def send(self) -> None:
        if self._here is not self.on_device:
            self._here.copy_(self.on_device, non_blocking=True)

    def look(self, label: str | None) -> None:
        """Raise NonFiniteError where it was raised, as far as is known here; lowers it."""
        if not int(self._here):
            return
        self.on_device.zero_()
        self._here.zero_()
        raise NonFiniteError(
            "q, k_new, v_new: expected finite values, got others in an earlier step "
            f"({label or 'cache'}); they were read as zeros"
        )


def flag_of(cache: Growing) -> _Flag:
    """The cache's notice, which its steps raise."""
    if cache.notice is None:
        assert cache.store is not None
        cache.notice = _Flag(cache.store.device)
    return cache.notice


def look(cache: Growing) -> None:
    """Raise NonFiniteError where a step before this one had values that were not finite."""
    cache.look()
