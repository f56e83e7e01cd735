"""The two page pools of a cache: INT8 pages for the attention sinks, compressed pages for all later blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..config import TurboConfig
from .channel_order import ChannelOrder, packed, unpacked
from .compression import Compression, Encoded
from .layout import WIDEST, PageLayout
from .pool import PagePool
from .quantizer import quantizer_for


class PagePools:
    """sinks: pages of the first `sink_blocks` blocks of a sequence. compressed: those of later blocks; None until
    `freeze` fixes their format: widths, and the order of K's channels or None."""

    def __init__(self, config: TurboConfig, heads: int, head_dim: int, device: torch.device, v_head_dim: int = 0):
        self.config, self.device = config, device
        self.sink_blocks = config.sink_tokens // config.block_size
        layout = PageLayout.uniform(heads, head_dim, config.block_size, WIDEST, config.token_scales, v_head_dim)
        self.sinks = PagePool(layout, device)
        self.compressed: PagePool | None = None
        self._order: Tensor | None = None

    def freeze(self, head_bits: Tensor, order: ChannelOrder | None = None) -> None:
        """Fix the widths int64 [2, Hkv] of all pages after the sinks, and the order of K's channels in them."""
        self.compressed = PagePool(self._layout(head_bits, order), self.device)
        self._order = None if order is None else packed(order.permutation)

    def thaw(self) -> None:
        """Undo `freeze`, while no page has that format."""
        self.compressed = self._order = None

    @property
    def head_bits(self) -> Tensor | None:
        """int64 [2, Hkv], widths of K and V in compressed pages; None until they are fixed."""
        return (
            None
            if self.compressed is None
            else torch.tensor([self.compressed.layout.k_bits, self.compressed.layout.v_bits])
        )

    @property
    def order(self) -> ChannelOrder | None:
        """The order of K's channels in compressed pages, for heads that have two widths."""
        if self.compressed is None or self._order is None:
            return None
        layout = self.compressed.layout
        halved = torch.tensor(layout.k_halves or [False] * layout.num_kv_heads)
        return ChannelOrder(unpacked(self._order, layout.head_dim), halved)

    def _layout(self, head_bits: Tensor, order: ChannelOrder | None) -> PageLayout:
        k_bits, v_bits = head_bits.tolist()
        halves = () if order is None else tuple(order.halved.tolist())
        return replace(self.sinks.layout, k_bits=tuple(k_bits), v_bits=tuple(v_bits), k_halves=halves)

    def encode(self, compression: Compression) -> list[Encoded]:
        """Encode full blocks; sink blocks and others become separate parts."""
        parts, flush = [], compression.flush
        sink = flush.block < self.sink_blocks
        for is_sink, chosen in ((True, flush.where(sink)), (False, flush.where(~sink))):
            if len(chosen.batch):
                layout, order = self.sinks.layout, None
                if not is_sink:
                    bits, order = compression.head_bits, compression.order
                    assert bits is not None
                    order = None if order is None else order.at(bits)
                    layout = self._layout(bits, order)
                tiles, rotated = chosen.tiles, self.config.rotate
                sides = tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale
                pages = quantizer_for(self.device).encode_pages(layout, *sides, self.config.search, order, rotated)
                parts.append(Encoded(layout, chosen, pages, order, rotated))
        return parts

    def of(self, sinks: bool) -> PagePool:
        pool = self.sinks if sinks else self.compressed
        assert pool is not None
        return pool

    def of_block(self, block: int) -> PagePool:
        return self.of(block < self.sink_blocks)

    def part(self, sinks: bool) -> slice:
        """The blocks of a sequence whose pages are in the sink pool, or in the compressed pool."""
        return slice(None, self.sink_blocks) if sinks else slice(self.sink_blocks, None)

    def reserve(self, sinks: int, others: int, singly: bool) -> None:
        """Reserve memory for so many pages; for compressed ones only once their format is fixed."""
        self.sinks.reserve(sinks, singly)
        if self.compressed is not None:
            self.compressed.reserve(others, singly)

    def retain(self, pages: list[int]) -> None:
        """Count one more reference to each page of a sequence, from its first block on."""
        self.sinks.retain(pages[: self.sink_blocks])
        if self.compressed is not None:
            self.compressed.retain(pages[self.sink_blocks :])

    def release(self, pages: list[int], first: int = 0) -> None:
        """Drop a reference to each page of consecutive blocks from block `first` on."""
        split = max(self.sink_blocks - first, 0)
        self.sinks.release(pages[:split])
        if self.compressed is not None:
            self.compressed.release(pages[split:])

    def nbytes(self, tables: list[list[int]], pending: dict[bool, int]) -> int:
        """Bytes of the pages in `tables`, of `pending` ones that are in no table yet (by `sinks`), of unused reserved
        memory, of widths and channel order."""
        total = 0
        for sinks, pool in ((True, self.sinks), (False, self.compressed)):
            if pool is not None:
                held: Iterable[int] = (page for table in tables for page in table[self.part(sinks)])
                total += pool.extent(held) + pending[sinks] * pool.layout.page_bytes + pool.idle_nbytes
        return total + (0 if self._order is None else self._order.nbytes)

    @property
    def reserved_pages(self) -> tuple[int, int]:
        """Sink pages and compressed pages that memory is reserved for, those in use included."""
        return self.sinks.reserved, 0 if self.compressed is None else self.compressed.reserved

    def empty(self) -> PagePools:
        """New pools of the same formats."""
        other = self.shared()
        other.sinks = PagePool(self.sinks.layout, self.device)
        if self.compressed is not None:
            other.compressed = PagePool(self.compressed.layout, self.device)
        return other

    def shared(self) -> PagePools:
        """Pools for another page table: the same pools, but each table fixes a format that is not fixed yet itself."""
        return copy.copy(self)
