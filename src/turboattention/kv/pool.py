"""Pages of one layout: handed out by number, shared by counting, and freed when nobody uses them.

A page is written once and never changed, so sequences that share a past share its pages (beams,
clones) and copying is never needed. Each page is memory of its own: growing moves nothing, and what
a window, a crop or a selection leaves behind is free at once, whichever pages it was allocated with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modes import in_own_modes
from .layout import PageLayout


class PagePool:
    """Allocator of pages `uint8 [page_bytes]` on one device."""

    def __init__(self, layout: PageLayout, device: torch.device):
        self.layout = layout
        self.device = device
        self._pages: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._idle: list[Tensor] = []
        self.reserved = 0
        self._next_page = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, used or idle."""
        return len(self._pages) * self.layout.page_bytes + self.idle_nbytes

    @property
    def idle_nbytes(self) -> int:
        """Bytes that are reserved and not used."""
        return len(self._idle) * self.layout.page_bytes

    @in_own_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies made under `inference_mode` can be written to outside of it, too."""
        self.__dict__.update(state)
        self._idle = self._new(len(self._idle))

    def reserve(self, pages: int) -> None:
        """From now on hold memory for at least `pages` pages, used ones included."""
        self.reserved = pages
        missing = max(0, pages - len(self._pages))
        self._idle.extend(self._new(missing - len(self._idle)))
        del self._idle[missing:]

    def allocate(self, count: int) -> list[int]:
        """Numbers of `count` pages, each counted once; a number never stands for another page later."""
        memory = self._idle[:count]
        memory += self._new(count - len(memory))
        del self._idle[:count]
        taken = list(range(self._next_page, self._next_page + count))
        self._next_page += count
        self._pages.update(zip(taken, memory, strict=True))
        self._counts.update(dict.fromkeys(taken, 1))
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page >= 0:
                self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; one that nobody uses any more is freed, unless it is reserved memory."""
        for page in pages:
            if page < 0:
                continue
            self._counts[page] -= 1
            if not self._counts[page]:
                del self._counts[page]
                memory = self._pages.pop(page)
                if len(self._pages) + len(self._idle) < self.reserved:
                    self._idle.append(memory)

    def address(self, page: int) -> int:
        """Where a page's bytes stand in memory; 0 for a negative number (an evicted page)."""
        return self._pages[page].data_ptr() if page >= 0 else 0

    def write(self, pages: Sequence[int], content: Tensor) -> None:
        """Fill pages with rows of uint8 [N, page_bytes]."""
        pairs = [(self._pages[page], row) for page, row in zip(pages, content, strict=True)]
        if pairs:  # on a GPU one launch for many
            torch._foreach_copy_([page for page, _ in pairs], [row for _, row in pairs])  # pyright: ignore

    def gather(self, pages: Iterable[int]) -> Tensor:
        """uint8 [N, page_bytes]; a negative number (an evicted page) gives zeros."""
        blank = torch.zeros(self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        return torch.stack([self._pages[page] if page >= 0 else blank for page in pages])

    def _new(self, count: int) -> list[Tensor]:
        size = self.layout.page_bytes
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count)]
