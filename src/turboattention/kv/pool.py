"""Pages of one layout: slabs of memory, handed out by number and shared by counting.

A page is written once and never changed, so sequences that share a past share its pages (beams,
clones) and copying is never needed. Growing adds a slab; what is there is not moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .layout import PageLayout

# A new slab is this share of what is already there, so that few bytes lie idle.
_GROWTH = 1 / 64


class PagePool:
    """Allocator of pages `uint8 [page_bytes]` on one device."""

    def __init__(self, layout: PageLayout, device: torch.device):
        self.layout = layout
        self.device = device
        self._slabs: dict[int, Tensor] = {}
        self._slab_of: dict[int, int] = {}
        self._pages: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._free: list[int] = []
        self._kept: set[int] = set()
        self._next_page = 0
        self._next_slab = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, used or free."""
        return sum(slab.numel() for slab in self._slabs.values())

    def reserve(self, pages: int) -> None:
        """Make one slab for `pages` more pages, kept even while it is empty (preallocation)."""
        if pages > 0:
            self._kept.add(self._add_slab(pages))

    def allocate(self, count: int) -> list[int]:
        """Numbers of `count` pages, each counted once."""
        missing = count - len(self._free)
        if missing > 0:
            self._add_slab(max(missing, int(len(self._pages) * _GROWTH)))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._counts[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page >= 0:
                self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; a slab that nobody uses any more is freed."""
        touched = set()
        for page in pages:
            if page < 0:
                continue
            self._counts[page] -= 1
            if not self._counts[page]:
                del self._counts[page]
                self._free.append(page)
                touched.add(self._slab_of[page])
        for slab in touched - self._kept:
            members = [page for page, owner in self._slab_of.items() if owner == slab]
            if not any(page in self._counts for page in members):
                self._drop(slab, members)

    def address(self, page: int) -> int:
        """Where a page's bytes stand in memory; 0 for a negative number (an evicted page)."""
        return self._pages[page].data_ptr() if page >= 0 else 0

    def write(self, pages: Sequence[int], content: Tensor) -> None:
        """Fill pages with rows of uint8 [N, page_bytes]."""
        for page, row in zip(pages, content, strict=True):
            self._pages[page].copy_(row)

    def gather(self, pages: Iterable[int]) -> Tensor:
        """uint8 [N, page_bytes]; a negative number (an evicted page) gives zeros."""
        blank = torch.zeros(self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        return torch.stack([self._pages[page] if page >= 0 else blank for page in pages])

    def _add_slab(self, pages: int) -> int:
        slab = torch.empty(pages, self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        number, self._next_slab = self._next_slab, self._next_slab + 1
        self._slabs[number] = slab
        first, self._next_page = self._next_page, self._next_page + pages
        for index in range(pages):
            self._pages[first + index] = slab[index]
            self._slab_of[first + index] = number
        self._free.extend(reversed(range(first, first + pages)))
        return number

    def _drop(self, slab: int, members: list[int]) -> None:
        gone = set(members)
        self._free = [page for page in self._free if page not in gone]
        for page in members:
            del self._pages[page], self._slab_of[page]
        del self._slabs[slab]
