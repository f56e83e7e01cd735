"""Page tables of a batch of sequences over shared page pools."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from .channel_order import ChannelOrder, restore_keys, unordered_rows
from .layout import WIDEST, PageLayout
from .pages import Tiles, decode_pages
from .pool import PagePool
from .quantizer import quantizer_for

EVICTED = -1
CROPPED = 16
"""Tokens that a sequence with a sliding window can always be cropped by; eviction keeps the blocks this needs."""

_SPARE_COLUMNS = 64


@dataclass(frozen=True)
class Flush:
    """Full blocks to be compressed into pages.

    batch, block: int64 [N] (CPU), sequence and block index of each row of `tiles` [N, H, B, D], ordered by sequence,
    then block.
    """

    batch: Tensor
    block: Tensor
    tiles: Tiles

    def where(self, chosen: Tensor) -> Flush:
        """The rows selected by a bool [N]."""
        rows = chosen.to(self.tiles.k8.device)
        return Flush(self.batch[chosen], self.block[chosen], self.tiles.map(lambda x: x[rows]))


@dataclass(frozen=True)
class Encoded:
    """Encoded blocks: `pages` uint8 [N, page_bytes] in `layout`, one for each of the N rows of `flush`.

    order: the order of K's channels in `pages`, or None; rotated: whether INT8 rows are.
    """

    layout: PageLayout
    flush: Flush
    pages: Tensor
    order: ChannelOrder | None
    rotated: bool

    def decoded(self) -> Tiles:
        """Decode the pages: int8 [N, H, B, D] and scales, as stored."""
        return decode_pages(self.layout, self.pages)

    def floats(self) -> tuple[Tensor, Tensor]:
        """The dequantized k (without its mean) and v [N, H, B, D] in the model's space."""
        k, v = self.decoded().floats()
        return restore_keys(k, self.order, self.rotated), restore_keys(v, None, self.rotated)


class PageStore:
    """For each sequence, the page number of every block: sink pages first, then compressed pages."""

    def __init__(
        self,
        config: TurboConfig,
        batch: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        windowed: bool = False,
        v_head_dim: int = 0,
    ):
        self.config, self.windowed = config, windowed
        self.device = device
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.sink_blocks = config.sink_tokens // config.block_size
        sink_layout = PageLayout.uniform(heads, head_dim, config.block_size, WIDEST, config.token_scales, v_head_dim)
        self.sinks = PagePool(sink_layout, device)
        self.compressed: PagePool | None = None
        self.head_bits: Tensor | None = None
        self.order: ChannelOrder | None = None
        self._addresses: Tensor | None = None
        self._fresh = {True: 0, False: 0}
        """Number of pages from `fresh_pages` that were not adopted or discarded yet, by `sinks`."""

    def freeze(self, head_bits: Tensor, order: ChannelOrder | None = None) -> None:
        """Fix the widths int64 [2, Hkv] of all pages after the sinks, and the order of K's channels in them."""
        self.order = None if order is None else order.at(head_bits)
        self.head_bits = head_bits.clone()
        self.compressed = PagePool(self.layout_for(head_bits, order), self.device)

    def layout_for(self, head_bits: Tensor, order: ChannelOrder | None) -> PageLayout:
        sink, (k_bits, v_bits) = self.sinks.layout, head_bits.tolist()
        halves = () if order is None else tuple(order.halved.tolist())
        return replace(sink, k_bits=tuple(k_bits), v_bits=tuple(v_bits), k_halves=halves)

    def reserve(self, tokens: int, window: int | None) -> None:
        """Reserve memory for `tokens` tokens, or a `window`, of each sequence; only sinks until widths are frozen."""
        sinks, others = self._needed(tokens, window)
        self.sinks.reserve(sinks, self.windowed)
        if self.compressed is not None:
            self.compressed.reserve(others, self.windowed)

    def _needed(self, tokens: int, window: int | None) -> tuple[int, int]:
        """Sink pages and compressed pages for `tokens` tokens per sequence."""
        blocks = tokens // self.config.block_size
        sinks = min(blocks, self.sink_blocks)
        others = blocks - sinks
        # With a window: blocks that the next query may see, also after a crop, and one that fills before an eviction.
        seen = None if window is None else -(-(window - 1 + CROPPED) // self.config.block_size)
        if seen is not None and blocks > seen + 1:
            sinks, others = 0, seen + 1
        return len(self.tables) * sinks, len(self.tables) * others

    @property
    def reserved(self) -> bool:
        """Whether memory was reserved for compressed pages."""
        return self.compressed is not None and self.compressed.reserved > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of these sequences, unused reserved memory of both pools, widths and channel order."""
        split, total = self.sink_blocks, 0
        for pool, sinks in ((self.sinks, True), (self.compressed, False)):
            if pool is not None:
                parts = (table[:split] if sinks else table[split:] for table in self.tables)
                held = pool.extent(page for part in parts for page in part)
                total += held + self._fresh[sinks] * pool.layout.page_bytes + pool.idle_nbytes
        return total + sum(x.nbytes for x in (self.head_bits, *(self.order or ())) if x is not None)

    @property
    def counts(self) -> Tensor:
        """int64 [B]: blocks of each sequence that are pages, including evicted ones."""
        return torch.tensor([len(table) for table in self.tables], dtype=torch.int64)

    # -- writing ------------------------------------------------------------------------------

    def encode(self, flush: Flush, head_bits: Tensor | None, order: ChannelOrder | None = None) -> list[Encoded]:
        """Encode full blocks; sink blocks and others become separate parts.

        head_bits: int64 [2, Hkv], required for blocks after the sinks. order: that of K's channels, if it is not fixed
        yet.
        """
        parts, sink = [], flush.block < self.sink_blocks
        for is_sink, chosen in ((True, flush.where(sink)), (False, flush.where(~sink))):
            if len(chosen.batch):
                layout, used = self.sinks.layout, None
                if not is_sink:
                    assert head_bits is not None
                    used = self.order if order is None else order.at(head_bits)
                    layout = self.layout_for(head_bits, used)
                tiles, rotated = chosen.tiles, self.config.rotate
                sides = tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale
                pages = quantizer_for(self.device).encode_pages(layout, *sides, self.config.search, used, rotated)
                parts.append(Encoded(layout, chosen, pages, used, rotated))
        return parts

    def append(self, parts: list[Encoded], before: Sequence[int] = (), skipped: Sequence[int] = ()) -> None:
        """Append encoded blocks to the page tables and `evict` the blocks before `before[b]`.

        skipped: sequences whose next block was evicted before it was written, once per block.
        """
        written: list[list[int]] = []
        try:
            for part in parts:
                written.append(self._written(part))
        except BaseException:  # no memory
            for part, pages in zip(parts, written, strict=False):
                self._pool_of(int(part.flush.block[0])).release(pages)
            raise
        if parts or len(skipped):
            self._addresses = None
        self.evict(before)
        for sequence in skipped:
            self.tables[sequence].append(EVICTED)
        for part, pages in zip(parts, written, strict=True):
            for sequence, page in zip(part.flush.batch.tolist(), pages, strict=True):
                self.tables[sequence].append(page)

    def _written(self, part: Encoded) -> list[int]:
        pool = self._pool_of(int(part.flush.block[0]))
        pages = pool.allocate(self.runs(part.flush.batch))
        pool.write(pages, part.pages)
        return pages

    def runs(self, batch: Tensor) -> list[int]:
        """Allocation runs for pages of sequences `batch` int64 [N]: one run per sequence, or one per page if a window
        releases pages one at a time."""
        return [1] * len(batch) if self.windowed else batch.unique_consecutive(return_counts=True)[1].tolist()

    def fresh_pages(self, count: int, sinks: bool = False) -> list[int]:
        """Allocate `count` compressed pages (or sink pages); the caller passes each to `adopt` or `discard`."""
        pages = self._pool(sinks).allocate([1] * count)
        self._fresh[sinks] += count
        return pages

    def discard(self, pages: list[int], sinks: bool = False) -> None:
        """Release pages that were not adopted."""
        self._pool(sinks).release(pages)
        self._fresh[sinks] -= len(pages)

    def page_address(self, page: int, sinks: bool = False) -> int:
        """Memory address of a page from `fresh_pages`."""
        return self._pool(sinks).address(page)

    def adopt(self, sequences: Sequence[int], pages: Sequence[int]) -> None:
        """Append one written page to the table of each of `sequences`."""
        addresses = self._addresses
        for sequence, page in zip(sequences, pages, strict=True):
            table = self.tables[sequence]
            if addresses is not None and len(table) < addresses.shape[1]:
                addresses[sequence, len(table)] = self._pool_of(len(table)).address(page)
            else:
                addresses = None
            self._fresh[len(table) < self.sink_blocks] -= 1
            table.append(page)
        self._addresses = addresses

    # -- reading ------------------------------------------------------------------------------

    def tiles(self, first: int, last: int) -> Tiles:
        """INT8 tiles [B, n, H, block, D] of blocks `first` to `last` (exclusive), as stored; scale 0 where there is no
        page."""
        split = min(max(self.sink_blocks, first), last)
        parts = []
        for pool, begin, end in ((self.sinks, first, split), (self.compressed or self.sinks, split, last)):
            if begin < end:
                pages = [page for table in self.tables for page in _entries(table, begin, end)]
                tiles = Tiles(*quantizer_for(self.device).decode_pages(pool.layout, pool.gather(pages)))
                parts.append(tiles.map(lambda x: x.unflatten(0, (len(self.tables), -1))))
        return parts[0] if len(parts) == 1 else Tiles.cat(parts, 1)

    def order_of(self, block: int) -> ChannelOrder | None:
        """The order of K's channels in the pages of a block; sinks have none."""
        return None if block < self.sink_blocks else self.order

    def rows(self, block: int) -> Tiles:
        """The pages of a block as INT8 rows like the buffer's, [B, H, block, D]; scale 0 where there is no page."""
        tiles, order = self.tiles(block, block + 1).map(lambda x: x[:, 0]), self.order_of(block)
        if order is None:
            return tiles
        k8, k_scale = unordered_rows(tiles.k8, tiles.k_scale, order, self.config.rotate)
        return replace(tiles, k8=k8, k_scale=torch.where(tiles.k_scale > 0, k_scale, 0.0))

    def addresses(self) -> Tensor:
        """int64 [B, P]: memory addresses of all pages, for kernels; 0 for evicted pages and past the last page."""
        if self._addresses is None:
            # Spare columns, so that most later blocks need no new table.
            widest = max(map(len, self.tables), default=0) + _SPARE_COLUMNS
            rows = [[self._pool_of(j).address(page) for j, page in enumerate(table)] for table in self.tables]
            padded = [row + [0] * (widest - len(row)) for row in rows]
            self._addresses = torch.tensor(padded, dtype=torch.int64).view(len(self.tables), widest)
        return self._addresses

    def evicted(self) -> list[int]:
        """Number of evicted blocks at the start of each sequence."""
        return [bisect_left(table, True, key=lambda page: page != EVICTED) for table in self.tables]

    def _pool_of(self, block: int) -> PagePool:
        return self._pool(block < self.sink_blocks)

    def _pool(self, sinks: bool) -> PagePool:
        pool = self.sinks if sinks else self.compressed
        assert pool is not None
        return pool

    def present(self, blocks: int) -> Tensor:
        """bool [B, blocks]: which blocks are pages that were not evicted."""
        rows = [[page != EVICTED for page in _entries(table, 0, blocks)] for table in self.tables]
        return torch.tensor(rows, dtype=torch.bool).view(len(self.tables), blocks)

    # -- changing -----------------------------------------------------------------------------

    def truncate(self, counts: list[int]) -> None:
        """Keep the first `counts[b]` blocks of each sequence and free the memory of the others."""
        for sinks in (True, False):
            self._uncrowd(sinks, counts)
        self._addresses = None
        for table, count in zip(self.tables, counts, strict=True):
            self._release(table, count, len(table))
            del table[count:]

    def evict(self, before: Sequence[int]) -> None:
        """Release the blocks before block `before[b]`; their table entries become `EVICTED`."""
        for table, end in zip(self.tables, before, strict=False):
            end = min(end, len(table))
            # Blocks are released from the front, so if the last one is evicted, all are.
            if end > 0 and table[end - 1] != EVICTED:
                self._addresses = None
                self._release(table, 0, end)
                table[:end] = [EVICTED] * end

    def _uncrowd(self, sinks: bool, counts: list[int]) -> None:
        """Copy pages before block `counts[b]` whose slabs would be mostly unused without the later pages."""
        pool = self.sinks if sinks else self.compressed
        if pool is None:
            return
        own = self._part(sinks)
        crowded: dict[int, None] = {}
        for table, count in zip(self.tables, counts, strict=True):
            kept, leaving = table[:count][own], table[own][len(table[:count][own]) :]
            crowded |= dict.fromkeys(pool.crowded([page for page in kept if page != EVICTED], leaving))
        if crowded:
            self._exchange(sinks, pool, pool, self._copied(pool, [*crowded], pool, [len(crowded)]))

    def apart(self, tokens: int, window: int | None) -> None:
        """Copy all pages into new pools, which reserve memory only for these sequences (as `reserve`)."""
        old = {sinks: self._pool(sinks) for sinks in (True, False)}
        new = {sinks: PagePool(pool.layout, self.device) for sinks, pool in old.items()}
        for pool, pages in zip(new.values(), self._needed(tokens, window), strict=True):
            pool.reserve(pages, self.windowed)
        copies = {}
        for sinks, pool in old.items():
            runs, seen = [], set[int]()
            for table in self.tables:
                runs.append([page for page in table[self._part(sinks)] if page >= 0 and page not in seen])
                seen.update(runs[-1])
            pages = [page for run in runs for page in run]
            copies[sinks] = self._copied(pool, pages, new[sinks], [len(run) for run in runs])
        for sinks, pool in old.items():
            self._exchange(sinks, pool, new[sinks], copies[sinks])
        self.sinks, self.compressed = new[True], new[False]

    def _copied(self, old: PagePool, pages: list[int], new: PagePool, runs: Sequence[int]) -> dict[int, int]:
        """Copy `pages` of `old` to new pages of `new` with a reference count of 1; returns old -> new numbers."""
        fresh = new.allocate([1] * len(pages) if self.windowed else runs)
        new.write(fresh, old.gather(pages))
        return dict(zip(pages, fresh, strict=True))

    def _exchange(self, sinks: bool, old: PagePool, new: PagePool, copies: dict[int, int]) -> None:
        """Replace pages by their copies in all tables."""
        self._addresses = None
        for table in self.tables:
            gone = [page for page in table[self._part(sinks)] if page in copies]
            table[self._part(sinks)] = [copies.get(page, page) for page in table[self._part(sinks)]]
            new.retain(copies[page] for page in gone)
            old.release(gone)
        new.release(copies.values())  # the reference held since `allocate`

    def _part(self, sinks: bool) -> slice:
        return slice(None, self.sink_blocks) if sinks else slice(self.sink_blocks, None)

    def select(self, index: list[int]) -> PageStore:
        """A store of the sequences `index[0], index[1], ...` over the same pools; no page is copied."""
        chosen = object.__new__(PageStore)
        tables = [list(self.tables[i]) for i in index]
        own = {"tables": tables, "_addresses": None, "_fresh": {True: 0, False: 0}}
        chosen.__dict__ = {**self.__dict__, **own}
        for table in chosen.tables:
            self.sinks.retain(table[: self.sink_blocks])
            if self.compressed is not None:
                self.compressed.retain(table[self.sink_blocks :])
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        """In a copy, pages have other addresses, and pages from `fresh_pages` are not pending."""
        return {**self.__dict__, "_addresses": None, "_fresh": {True: 0, False: 0}}

    def __del__(self) -> None:
        for table in self.__dict__.get("tables", ()):
            self._release(table, 0, len(table))

    def _release(self, table: list[int], begin: int, end: int) -> None:
        split = min(max(self.sink_blocks, begin), end)
        self.sinks.release(table[begin:split])
        if self.compressed is not None:
            self.compressed.release(table[split:end])


def _entries(table: list[int], begin: int, end: int) -> list[int]:
    """`table[begin:end]`, padded with `EVICTED` where the table is shorter."""
    entries = table[begin:end]
    return entries + [EVICTED] * (end - begin - len(entries))
