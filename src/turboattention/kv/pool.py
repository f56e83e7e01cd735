"""A pool of reference-counted pages with one layout.

A page is written once and never modified or moved, so sequences with a common prefix (beams, clones) share pages, and
readers need no lock. The pages of one allocation run come from one slab (or several, of at most `LARGEST` pages). A
slab is freed with the last of its pages, so sequences that release part of a slab copy the pages that they keep, unless
these are most of it (`sparse`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..modes import in_own_modes
from .layout import PageLayout

LARGEST = 64
"""Maximum pages per slab. It bounds the number of pages that a crop has to copy."""

_WASTE = 16
"""Of each slab, the sequences of a cache leave at most 1 / _WASTE as many pages as they use."""


@dataclass(eq=False)
class _Slab:
    """uint8 [pages, page_bytes], of which `used` are in use. Freed pages of a reserved slab are reused."""

    memory: Tensor
    used: int = 0
    reserved: bool = False


class PagePool:
    """Allocator of pages `uint8 [page_bytes]` on one device."""

    def __init__(self, layout: PageLayout, device: torch.device):
        self.layout = layout
        self.device = device
        self._pages: dict[int, tuple[_Slab, int]] = {}
        self._counts: dict[int, int] = {}
        self._idle: list[tuple[_Slab, int]] = []
        """Unused rows of reserved slabs."""
        self._held = self.reserved = self._next_page = 0
        self._lock = threading.RLock()
        """Clones may be used by several threads, and may be garbage-collected during a call."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self._held * self.layout.page_bytes

    @property
    def idle_nbytes(self) -> int:
        """Bytes that are reserved and not used."""
        return len(self._idle) * self.layout.page_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    @in_own_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Slabs copied under `inference_mode` are cloned, so that they can be written to outside it."""
        self.__dict__.update(state)
        self._lock = threading.RLock()
        for slab in {id(slab): slab for slab, _ in (*self._pages.values(), *self._idle)}.values():
            if slab.memory.is_inference():
                slab.memory = slab.memory.clone()

    def reserve(self, pages: int, singly: bool = False) -> None:
        """Keep memory for at least `pages` pages, including those in use; with `singly`, one slab per page."""
        with self._lock:
            before, missing = self._held, max(0, pages - self._held)
            new = self._new([1] * missing if singly else [missing], reserved=True)
            for slab, _ in self._pages.values():
                slab.reserved = slab.reserved or pages >= before
            self._idle.extend((slab, row) for slab in new for row in range(len(slab.memory)))
            self.reserved = pages

    def allocate(self, runs: Sequence[int]) -> list[int]:
        """Allocate `sum(runs)` pages with a reference count of 1 and return their numbers, which are never reused.

        A run is a number of pages that are likely to be released together, such as those of one sequence.
        """
        with self._lock:
            count = sum(runs)
            rows = self._idle[:count]
            for slab in self._new(_rest(runs, len(rows))):
                rows.extend((slab, row) for row in range(len(slab.memory)))
            del self._idle[:count]
            taken = list(range(self._next_page, self._next_page + count))
            self._next_page += count
            for slab, _ in rows:
                slab.used += 1
            self._pages.update(zip(taken, rows, strict=True))
            self._counts.update(dict.fromkeys(taken, 1))
            return taken

    def retain(self, pages: Iterable[int]) -> None:
        with self._lock:
            for page in pages:
                if page >= 0:
                    self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Decrement reference counts and free unreferenced pages; reserved memory is kept."""
        with self._lock:
            for page in pages:
                if page < 0:
                    continue
                self._counts[page] -= 1
                if not self._counts[page]:
                    del self._counts[page]
                    self._free(*self._pages.pop(page))

    def sparse(self, used: Iterable[int], left: Iterable[int]) -> list[list[int]]:
        """The pages to copy, by slab: those of `used` whose slab has become sparse, now that pages are `left`.

        used: all pages in use, before pages that are `left` are released. Their slabs must not have been sparse before.
        """
        cut = {id(slab): len(slab.memory) for slab, _ in self._locations(left) if not slab.reserved}
        kept: dict[int, list[int]] = {slab: [] for slab, rows in cut.items() if rows > 1}
        if kept:
            for page in sorted(used):
                if page >= 0 and (pages := kept.get(id(self._pages[page][0]))) is not None:
                    pages.append(page)
        return [pages for slab, pages in kept.items() if pages and (cut[slab] - len(pages)) * _WASTE > len(pages)]

    def address(self, page: int) -> int:
        """Memory address of a page; 0 for a negative number (an evicted page)."""
        if page < 0:
            return 0
        slab, row = self._pages[page]
        return slab.memory.data_ptr() + row * self.layout.page_bytes

    def extent(self, pages: Iterable[int]) -> int:
        """Bytes of the slabs that contain `pages`; in reserved slabs only the pages themselves count."""
        rows = self._locations({*pages})
        own = sum(slab.reserved for slab, _ in rows)
        slabs = {id(slab): len(slab.memory) for slab, _ in rows if not slab.reserved}
        return (own + sum(slabs.values())) * self.layout.page_bytes

    def write(self, pages: Sequence[int], content: Tensor) -> None:
        """Write the rows of `content` uint8 [N, page_bytes] to N pages."""
        if len(pages) != len(content):
            raise ValueError(f"content: expected a row for each of {len(pages)} pages, got {len(content)}")
        targets, sources, first = [], [], 0
        for part in self._runs(pages):
            targets.append(part)
            sources.append(content[first : first + len(part)])
            first += len(part)
        if targets:  # one launch for many copies on a GPU
            torch._foreach_copy_(targets, sources)  # pyright: ignore

    def gather(self, pages: Sequence[int]) -> Tensor:
        """Contents of pages, uint8 [N, page_bytes]; zeros for a negative number (an evicted page)."""
        parts = self._runs(pages)
        empty = torch.empty(0, self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        return torch.cat(parts) if parts else empty

    def _runs(self, pages: Sequence[int]) -> list[Tensor]:
        """Views uint8 [n, page_bytes] of the pages in order; n pages that are adjacent in a slab share one view."""
        parts = []
        locations: list[Any] = [(*self._pages[page], i) if page >= 0 else (None, 0, i) for i, page in enumerate(pages)]
        for _, side_by_side in groupby(locations, lambda location: (id(location[0]), location[1] - location[2])):
            (slab, row, _), *rest = side_by_side
            if slab is None:
                parts.append(torch.zeros(1, self.layout.page_bytes, dtype=torch.uint8, device=self.device))
            else:
                parts.append(slab.memory[row : row + 1 + len(rest)])
        return parts

    def _locations(self, pages: Iterable[int]) -> list[tuple[_Slab, int]]:
        return [self._pages[page] for page in pages if page >= 0]

    def _free(self, slab: _Slab, row: int) -> None:
        slab.used -= 1
        rows = len(slab.memory)
        if not slab.used and self._held - rows >= self.reserved:
            self._held -= rows
            if slab.reserved and rows > 1:
                self._idle = [location for location in self._idle if location[0] is not slab]
        elif slab.reserved:
            self._idle.append((slab, row))
        elif not slab.used:
            slab.reserved = True
            self._idle.extend((slab, row) for row in range(rows))

    def _new(self, runs: Iterable[int], reserved: bool = False) -> list[_Slab]:
        sizes = [min(LARGEST, run - at) for run in runs for at in range(0, run, LARGEST)]
        shapes = [(size, self.layout.page_bytes) for size in sizes]
        slabs = [_Slab(torch.empty(x, dtype=torch.uint8, device=self.device), 0, reserved) for x in shapes]
        self._held += sum(sizes)
        return slabs


def _rest(runs: Sequence[int], taken: int) -> list[int]:
    """The runs without their first `taken` pages in total."""
    rest = []
    for run in runs:
        rest.append(max(0, run - taken))
        taken = max(0, taken - run)
    return rest
