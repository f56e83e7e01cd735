"""Page tables on the device, and the allocation of pages for blocks that fill."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.nn.functional import pad

from ...kernels.inputs import Pages
from ...kv.cache import KVCache
from ...modes import in_own_modes
from ...uploads import upload
from .. import inputs
from .host_lengths import StepPlan

_SPARE_COLUMNS = 64  # added to a table that is full


def pages_of(cache: KVCache) -> Pages | None:
    """The cache's page tables, copied to the device; None if it has no pages."""
    pages = inputs.pages_of(cache)
    if pages is None:
        return None
    assert cache.page_table is not None
    return _uploaded(pages, cache.page_table.device)


def _uploaded(pages: Pages, device: torch.device) -> Pages:
    return replace(pages, addresses=upload(pages.addresses, device), counts=upload(pages.counts, device))


class PageTables:
    """on_device: the tables, updated in place. host: the addresses of the same pages in the cache's table."""

    @in_own_modes
    def __init__(self, cache: KVCache):
        assert cache.page_table is not None
        self._table = cache.page_table
        self.host = self._table.addresses()
        own = replace(inputs.tables_of(self._table), addresses=self.host.clone())
        self.on_device = _uploaded(own, self._table.device)
        self._reserved: list[list[int]] = [[] for _ in self._table.pages]

    @in_own_modes
    def copied(self) -> PageTables:
        """A copy with separate counts, for a trial step."""
        other = copy.copy(self)
        other.on_device = replace(self.on_device, counts=self.on_device.counts.clone())
        return other

    @in_own_modes
    def freeze(self, cache: KVCache) -> None:
        """Freeze widths that do not depend on the tokens."""
        assert cache.configured_bits is not None
        cache.freeze(cache.configured_bits)
        self.on_device = replace(self.on_device, compressed=self._table.pools.of(sinks=False).layout)

    @in_own_modes
    def reserve(self, blocks: list[int]) -> None:
        """Allocate compressed pages for `blocks[b]` more blocks of each sequence and enter them in the table."""
        missing = [max(0, want - len(have)) for want, have in zip(blocks, self._reserved, strict=True)]
        pages = self._table.fresh_pages([1] * sum(missing))
        for reserved, count in zip(self._reserved, missing, strict=True):
            reserved.extend(pages[:count])
            del pages[:count]
        # The table must not be reallocated after a graph captured it.
        counts = self._table.counts.tolist()
        width = max(count + len(reserved) for count, reserved in zip(counts, self._reserved, strict=True))
        host = self._table.addresses()
        table = host.new_zeros(len(counts), max(width, host.shape[1]))
        table[:, : host.shape[1]] = host
        for row, count, reserved in zip(table, counts, self._reserved, strict=True):
            addresses = [self._table.page_address(page) for page in reserved]
            row[count : count + len(reserved)] = torch.tensor(addresses, dtype=torch.int64)
        self.on_device = replace(self.on_device, addresses=upload(table, self._table.device))

    @in_own_modes
    def take(self, plan: StepPlan) -> list[int]:
        """Pages for the blocks that the sequences in `plan.filled` fill, entered in the device's table."""
        missing = [b for b in plan.filled if not self._reserved[b]]
        new: dict[int, int] = {}
        try:
            for sinks in (True, False):
                some = [b for b in missing if (b in plan.sinks) is sinks]
                if some:
                    new |= zip(some, self._table.fresh_pages([1] * len(some), sinks), strict=True)
            if new:
                self._enter({b: self._table.page_address(page, b in plan.sinks) for b, page in new.items()})
        except BaseException:
            for b, page in new.items():
                self._table.discard([page], b in plan.sinks)
            raise
        return [new[b] if b in new else self._reserved[b].pop(0) for b in plan.filled]

    def _enter(self, addresses: dict[int, int]) -> None:
        """Append a page address to the device's table for each sequence in `addresses`."""
        p = self.on_device
        if max(map(len, self._table.pages)) >= p.addresses.shape[1]:
            self.on_device = p = replace(p, addresses=pad(p.addresses, (0, _SPARE_COLUMNS)))
        fresh = torch.zeros(len(self._table.pages), dtype=torch.int64)
        for b, address in addresses.items():
            fresh[b] = address
        table, column = p.addresses, p.counts[:, None]
        fresh = upload(fresh, table.device)[:, None]
        table.scatter_(1, column, torch.where(fresh != 0, fresh, table.gather(1, column)))

    def give_back(self, plan: StepPlan, pages: list[int]) -> None:
        """Release the pages of a step that failed, and all reserved pages."""
        for b, page in zip(plan.filled, pages, strict=True):
            self._table.discard([page], b in plan.sinks)
        self.release()

    def release(self) -> None:
        """Release reserved pages that were not filled."""
        for reserved in self._reserved:
            if reserved:
                self._table.discard(reserved)
            reserved.clear()

    @in_own_modes
    def follow(self) -> None:
        """Clear the addresses of pages that the cache evicted in a step; they may be reused."""
        if self._table.addresses() is self.host:
            return
        self.host, table = self._table.addresses(), self.on_device.addresses
        evicted = self._table.evicted()
        if any(evicted):
            end = upload(torch.tensor(evicted), table.device)[:, None]
            table.masked_fill_(torch.arange(table.shape[1], device=table.device) < end, 0)
