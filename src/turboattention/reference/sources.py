"""The INT8 tiles that attention reads: pages of a cache and staged tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kv.cache import KVCache
from ..kv.channel_order import ChannelOrder
from ..kv.compression import Compression
from ..kv.growth import encode
from ..kv.pages import Tiles
from ..kv.stage1 import SequenceState, Stage


class Source:
    """The blocks of a batch: pages, followed by INT8 blocks that are not compressed.

    lengths: int64 [B]; k_mean: [B, H, D] or None; mean_from: the first position whose key is stored without the mean;
    k_order: the order of K's channels in compressed pages, or None.
    """

    def __init__(self, stage: Stage | SequenceState, cache: KVCache | None, size: int, mean_from: int):
        tiles = stage.tiles if isinstance(stage, Stage) else stage.tail_tiles
        self.lengths, self.k_mean = stage.lengths, stage.k_mean
        self.mean_from = mean_from
        self._cache, self._size = cache, size
        self.k_order: ChannelOrder | None = None if cache is None else cache.k_order
        self._sinks = 0 if cache is None else cache.sink_blocks
        self._first_tail_block = self._first_unstored = stage.start // size
        self._tail = None if tiles is None else _in_blocks(tiles, size)
        self._stored: Tiles | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-int(self.lengths.max()) // self._size) if len(self.lengths) else 0

    def runs(self, at_once: int) -> Iterator[tuple[int, int]]:
        """All blocks, in runs of up to `at_once`.

        Runs are split where the shortest and the longest page table end, because mixing pages and INT8 blocks is slow.
        """
        if not self.blocks:
            return
        bounds = sorted({0, int(self._first_tail_block.min()), int(self._first_tail_block.max()), self.blocks})
        for begin, end in itertools.pairwise(bounds):
            for first in range(begin, end, at_once):
                yield first, min(first + at_once, end)

    def read_back(self, cache: KVCache, compression: Compression) -> None:
        """Also hold the blocks that committing the stage compresses in stored form, for queries in later blocks."""
        assert self._tail is not None
        stored = self._tail.map(torch.clone)
        for part in encode(cache, compression):
            if part.order is not None and bool(part.order.halved.any()):
                self.k_order, self._sinks = part.order, cache.sink_blocks
            tiles, batch = part.decoded(), part.flush.batch
            at = batch.to(part.pages.device), (part.flush.block - self._first_tail_block[batch]).to(part.pages.device)
            for name in ("k8", "v8", "k_scale", "v_scale"):
                target = getattr(stored, name)
                target[at] = getattr(tiles, name).to(target.dtype)
        filled = torch.bincount(compression.flush.batch, minlength=len(self._first_tail_block))
        self._stored, self._first_unstored = stored, self._first_tail_block + filled

    def views(self, first: int, last: int) -> Iterator[tuple[Tiles, Tensor, bool | None]]:
        """Tiles [B, n, H, T, D] of blocks `first` to `last` (exclusive), bool [B, n], whether K has the order of
        compressed pages, and the queries that read them.

        These are all queries (None), those in the same or an earlier block (True), or those in later blocks (False).
        """
        if self._stored is None:
            yield self._tiles(first, last, self._tail), self._in_order(first, last, self._first_tail_block), None
        else:
            yield self._tiles(first, last, self._stored), self._in_order(first, last, self._first_unstored), False
            yield self._tiles(first, last, self._tail), self._in_order(first, last, self._first_tail_block), True

    def _in_order(self, first: int, last: int, pages: Tensor) -> Tensor:
        """bool [B, n]: whether a block is a compressed page, of `pages` int64 [B] including sinks, and has an order."""
        block = torch.arange(first, last)
        return (block >= self._sinks) & (block < pages[:, None]) & (self.k_order is not None)

    def _tiles(self, first: int, last: int, tail: Tiles | None) -> Tiles:
        lowest, highest = int(self._first_tail_block.min()), int(self._first_tail_block.max())
        if self._cache is not None and (last <= lowest or tail is None):
            return self._cache.page_tiles(first, last)
        assert tail is not None
        if lowest == highest and first >= lowest:
            return tail.map(lambda x: x[:, first - lowest : last - lowest])
        assert self._cache is not None
        count = tail.k8.shape[1]
        index = torch.arange(first, last) - self._first_tail_block[:, None]
        in_tail = ((index >= 0) & (index < count)).to(tail.k8.device)
        rows = torch.arange(len(index))[:, None], index.clamp(0, count - 1)
        picked, pages = tail.map(lambda x: x[rows]), self._cache.page_tiles(first, last)
        return Tiles(
            torch.where(in_tail[:, :, None, None, None], picked.k8, pages.k8),
            torch.where(in_tail[:, :, None, None, None], picked.v8, pages.v8),
            torch.where(in_tail[:, :, None, None], picked.k_scale, pages.k_scale),
            torch.where(in_tail[:, :, None, None], picked.v_scale, pages.v_scale),
        )


def _in_blocks(tiles: Tiles, size: int) -> Tiles:
    """[B, H, W, ...] -> [B, ceil(W / T), H, T, ...], padded with zeros."""

    def cut(x: Tensor) -> Tensor:
        missing = -x.shape[2] % size
        if missing:
            x = torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)
        return x.unflatten(2, (-1, size)).transpose(1, 2)

    return tiles.map(cut)
