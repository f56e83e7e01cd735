"""Page tables of a batch of sequences over shared page pools."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..modes import in_own_modes
from .channel_order import ChannelOrder, unordered_rows
from .compaction import leave_sparse_slabs, move_to_own_pools
from .compression import Encoded
from .page_pools import PagePools
from .pages import Tiles
from .quantizer import quantizer_for
from .window import most_blocks

EVICTED = -1
_SPARE_COLUMNS = 64


class PageTable:
    """pages: for each sequence, the page number of every block, sink pages first; `EVICTED` where a sliding window has
    released the page. pools: the memory behind the numbers."""

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
        self.config, self.device, self.windowed = config, device, windowed
        self.pools = PagePools(config, heads, head_dim, device, v_head_dim)
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self._addresses: Tensor | None = None
        self._pending = {True: 0, False: 0}
        """Number of pages from `fresh_pages` that were not adopted or discarded yet, by `sinks`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of these sequences, unused reserved memory of both pools, widths and channel order."""
        return self.pools.nbytes(self.pages, self._pending)

    @property
    def counts(self) -> Tensor:
        """int64 [B]: blocks of each sequence that are pages, including evicted ones."""
        return torch.tensor([len(table) for table in self.pages], dtype=torch.int64)

    @property
    def sink_blocks(self) -> int:
        return self.pools.sink_blocks

    def reserve(self, tokens: int, window: int | None) -> None:
        """Reserve memory for `tokens` tokens, or a `window`, of each sequence; only sinks until widths are frozen."""
        self.pools.reserve(*self._needed(tokens, window), self.windowed)

    def _needed(self, tokens: int, window: int | None) -> tuple[int, int]:
        """Sink pages and compressed pages for `tokens` tokens per sequence."""
        blocks = tokens // self.config.block_size
        sinks = min(blocks, self.sink_blocks)
        others = blocks - sinks
        most = None if window is None else most_blocks(window, self.config.block_size)
        if most is not None and blocks > most:
            sinks, others = 0, most
        return len(self.pages) * sinks, len(self.pages) * others

    # -- writing ------------------------------------------------------------------------------

    def append(self, parts: list[Encoded], before: Sequence[int] = (), skipped: Sequence[int] = ()) -> None:
        """Append encoded blocks to the page tables and `evict` the blocks before `before[b]`.

        skipped: sequences whose next block was evicted before it was written, once per block.
        """
        written: list[tuple[bool, list[int]]] = []
        try:
            for part in parts:
                sinks = int(part.flush.block[0]) < self.sink_blocks
                pages = self.fresh_pages(self.runs(part.flush.batch), sinks)
                written.append((sinks, pages))
                self.pools.of(sinks).write(pages, part.pages)
        except BaseException:  # no memory
            for sinks, pages in written:
                self.discard(pages, sinks)
            raise
        if parts or len(skipped):
            self._addresses = None
        self.evict(before)
        self.adopt(skipped, [EVICTED] * len(skipped))
        for part, (_, pages) in zip(parts, written, strict=True):
            self.adopt(part.flush.batch.tolist(), pages)

    def runs(self, batch: Tensor) -> list[int]:
        """Runs for the pages of sequences `batch` int64 [N]: one run per sequence, or one per page if a window releases
        pages one at a time."""
        return [1] * len(batch) if self.windowed else batch.unique_consecutive(return_counts=True)[1].tolist()

    def next_pages(self, counts: Sequence[int], first: Sequence[int]) -> list[list[int]]:
        """`fresh_pages` for the next `counts[b]` blocks of each sequence, `EVICTED` for those before block `first[b]`.
        The caller passes them to `extend` or `give_back`."""
        new = [[EVICTED] * count for count in counts]
        try:
            for sinks in (True, False):
                wanted = [
                    (b, i)
                    for b, (table, count) in enumerate(zip(self.pages, counts, strict=True))
                    for i in range(max(first[b] - len(table), 0), count)
                    if (len(table) + i < self.sink_blocks) == sinks
                ]
                if wanted:
                    runs = self.runs(torch.tensor([b for b, _ in wanted]))
                    for (b, i), page in zip(wanted, self.fresh_pages(runs, sinks), strict=True):
                        new[b][i] = page
        except BaseException:  # no memory
            self.give_back(new)
            raise
        return new

    def give_back(self, new: list[list[int]]) -> None:
        """`discard` pages from `next_pages`."""
        for table, pages in zip(self.pages, new, strict=True):
            split = max(self.sink_blocks - len(table), 0)
            for sinks, some in ((True, pages[:split]), (False, pages[split:])):
                self.discard([page for page in some if page != EVICTED], sinks)

    def new_addresses(self, new: list[list[int]]) -> Tensor:
        """int64 [B, F]: memory addresses of pages from `next_pages`; 0 for evicted ones and after a sequence's last."""
        width = max(map(len, new), default=0)
        rows = [
            [self.pools.of_block(len(table) + i).address(page) for i, page in enumerate(pages)]
            for table, pages in zip(self.pages, new, strict=True)
        ]
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(new), width)

    def extend(self, new: list[list[int]], first: Sequence[int]) -> None:
        """`evict` the blocks before `first[b]`, then `adopt` pages from `next_pages`."""
        self._addresses = None
        self.evict(first)
        for sequence, pages in enumerate(new):
            self.adopt([sequence] * len(pages), pages)

    def fresh_pages(self, runs: Sequence[int], sinks: bool = False) -> list[int]:
        """Allocate compressed pages (or sink pages), adjacent within each of `runs`; the caller passes each to `adopt`
        or `discard`. All pages of a table are allocated here."""
        pages = self.pools.of(sinks).allocate(runs)
        self._pending[sinks] += len(pages)
        return pages

    def discard(self, pages: list[int], sinks: bool = False) -> None:
        """Release pages that were not adopted."""
        if pages:
            self.pools.of(sinks).release(pages)
            self._pending[sinks] -= len(pages)

    def page_address(self, page: int, sinks: bool = False) -> int:
        """Memory address of a page from `fresh_pages`."""
        return self.pools.of(sinks).address(page)

    def adopt(self, sequences: Sequence[int], pages: Sequence[int]) -> None:
        """Append one written page, or `EVICTED`, to the table of each of `sequences`."""
        addresses = self._addresses
        for sequence, page in zip(sequences, pages, strict=True):
            table = self.pages[sequence]
            if addresses is not None and len(table) < addresses.shape[1]:
                addresses[sequence, len(table)] = self.pools.of_block(len(table)).address(page)
            else:
                addresses = None
            self._pending[len(table) < self.sink_blocks] -= page != EVICTED
            table.append(page)
        self._addresses = addresses

    # -- reading ------------------------------------------------------------------------------

    def tiles(self, first: int, last: int) -> Tiles:
        """INT8 tiles [B, n, H, block, D] of blocks `first` to `last` (exclusive), as stored; scale 0 where there is no
        page."""
        split, pools = min(max(self.sink_blocks, first), last), self.pools
        parts = []
        for pool, begin, end in ((pools.sinks, first, split), (pools.compressed or pools.sinks, split, last)):
            if begin < end:
                pages = [page for table in self.pages for page in _entries(table, begin, end)]
                tiles = Tiles(*quantizer_for(self.device).decode_pages(pool.layout, pool.gather(pages)))
                parts.append(tiles.map(lambda x: x.unflatten(0, (len(self.pages), -1))))
        return parts[0] if len(parts) == 1 else Tiles.cat(parts, 1)

    def order_of(self, block: int) -> ChannelOrder | None:
        """The order of K's channels in the pages of a block; sinks have none."""
        return None if block < self.sink_blocks else self.pools.order

    def rows(self, block: int) -> Tiles:
        """The pages of a block as INT8 rows like the tail buffer's, [B, H, block, D]; scale 0 where there is no
        page."""
        tiles, order = self.tiles(block, block + 1).map(lambda x: x[:, 0]), self.order_of(block)
        if order is None:
            return tiles
        k8, k_scale = unordered_rows(tiles.k8, tiles.k_scale, order, self.config.rotate)
        return replace(tiles, k8=k8, k_scale=torch.where(tiles.k_scale > 0, k_scale, 0.0))

    def addresses(self) -> Tensor:
        """int64 [B, P]: memory addresses of all pages, for kernels; 0 for evicted pages and past the last page.

        A new tensor whenever pages have changed otherwise than by `adopt`.
        """
        if self._addresses is None:
            # Spare columns, so that most later blocks need no new table.
            widest = max(map(len, self.pages), default=0) + _SPARE_COLUMNS
            rows = [[self.pools.of_block(j).address(page) for j, page in enumerate(table)] for table in self.pages]
            padded = [row + [0] * (widest - len(row)) for row in rows]
            self._addresses = torch.tensor(padded, dtype=torch.int64).view(len(self.pages), widest)
        return self._addresses

    def evicted(self) -> list[int]:
        """Number of evicted blocks at the start of each sequence."""
        return [bisect_left(table, True, key=lambda page: page != EVICTED) for table in self.pages]

    def present(self, blocks: int) -> Tensor:
        """bool [B, blocks]: which blocks are pages that were not evicted."""
        rows = [[page != EVICTED for page in _entries(table, 0, blocks)] for table in self.pages]
        return torch.tensor(rows, dtype=torch.bool).view(len(self.pages), blocks)

    # -- changing -----------------------------------------------------------------------------

    def truncate(self, counts: list[int]) -> None:
        """Keep the first `counts[b]` blocks of each sequence and free the memory of the others."""
        left = [list(table) for table in self.pages]
        self._addresses = None
        for table, count in zip(self.pages, counts, strict=True):
            del table[count:]
        try:
            leave_sparse_slabs(self.pools, self.pages, left, self.windowed)
        finally:
            for table, count in zip(left, counts, strict=True):
                self.pools.release(table[count:], count)

    def evict(self, before: Sequence[int]) -> None:
        """Release the blocks before block `before[b]`; their table entries become `EVICTED`."""
        for table, end in zip(self.pages, before, strict=False):
            end = min(end, len(table))
            # Blocks are released from the front, so if the last one is evicted, all are.
            if end > 0 and table[end - 1] != EVICTED:
                self._addresses = None
                self.pools.release(table[:end])
                table[:end] = [EVICTED] * end

    def leave_pools(self, tokens: int, window: int | None) -> None:
        """Copy all pages into new pools, which reserve memory only for these sequences (as `reserve`)."""
        self._move(*self._needed(tokens, window))

    def _move(self, sinks: int, others: int) -> None:
        """Copy all pages into new pools, which reserve memory for so many pages."""
        new = self.pools.empty()
        new.reserve(sinks, others, self.windowed)
        move_to_own_pools(self.pools, new, self.pages, self.windowed)
        self.pools, self._addresses = new, None

    def select(self, index: list[int]) -> PageTable:
        """A table of the sequences `index[0], index[1], ...` over the same pools. Pages are shared, unless their slab
        also holds pages of other sequences."""
        chosen = object.__new__(PageTable)
        own = {"pages": [list(self.pages[i]) for i in index], "pools": self.pools.shared()}
        # Pages from `fresh_pages` belong to this table.
        chosen.__dict__ = {**self.__dict__, "_addresses": None, "_pending": {True: 0, False: 0}, **own}
        for table in chosen.pages:
            self.pools.retain(table)
        leave_sparse_slabs(chosen.pools, chosen.pages, self.pages, self.windowed)
        return chosen

    @in_own_modes
    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        """A table with separate pools, since clones in other threads may be changing these."""
        copy = self.select([*range(len(self.pages))])
        copy._move(*self.pools.reserved_pages)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """The state of a deep copy; the restored object owns its pages."""
        copy = deepcopy(self)
        state, copy.__dict__ = copy.__dict__, {}
        return state

    def __del__(self) -> None:
        if sys.is_finalizing():  # PyTorch may be gone already
            return
        for table in self.__dict__.get("pages", ()):
            self.pools.release(table)


def _entries(table: list[int], begin: int, end: int) -> list[int]:
    """`table[begin:end]`, padded with `EVICTED` where the table is shorter."""
    entries = table[begin:end]
    return entries + [EVICTED] * (end - begin - len(entries))
