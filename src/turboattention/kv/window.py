"""Sliding windows: blocks that no later query can see are released, 16 tokens late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .cache import KVCache

CROPPED = 16
"""Tokens that a sequence with a sliding window can always be cropped by; eviction keeps the blocks this needs."""


def first_kept_blocks(lengths: Tensor, window: int | None, block_size: int) -> Tensor:
    """int64 [B]: the first block that a later query can see, for sequences of `lengths` tokens."""
    if window is None:
        return torch.zeros_like(lengths)
    # The next query has position L and sees positions from L - window + 1 on; after a crop, earlier ones.
    return ((lengths - window + 1 - CROPPED) // block_size).clamp(min=0)


def most_blocks(window: int, block_size: int) -> int:
    """The largest number of pages of a sequence that grows token by token: it is reached when a block fills, before the
    block that leaves the window is released (`first_kept_blocks`)."""
    return -(-(window + CROPPED) // block_size)


def tokens_seen(lengths: Tensor, window: int | None) -> int:
    """Tokens that the next query of the longest sequence can see."""
    longest = int(lengths.max()) if len(lengths) else 0
    return longest if window is None else min(longest, window)


def check_window_kept(cache: KVCache, window_size: int | None) -> None:
    """No window may be wider than the cache's own. Raises InputError."""
    if cache.window_size is not None and (window_size is None or window_size > cache.window_size):
        raise InputError(
            f"window_size: expected at most the cache's own {cache.window_size} (older blocks are released), "
            f"got {window_size}"
        )


def check_pages_kept(cache: KVCache, positions: Tensor, valid: Tensor, window_size: int | None) -> None:
    """No query row may reach back to blocks that the cache's window has released: `positions` int64 and `valid` bool
    [B, Lq]. Raises InputError."""
    if cache.window_size is None or window_size is None or not positions.numel():
        return
    earliest = torch.where(valid, positions, torch.iinfo(torch.int64).max).amin(1)
    block = torch.arange(int(cache.page_counts.max()))
    reached = block >= ((earliest - window_size + 1).clamp(min=0) // cache.config.block_size)[:, None]
    gone = reached & (block < cache.page_counts[:, None]) & ~cache.readable_pages(len(block))
    if bool(gone.any()):
        raise InputError(
            f"q: expected rows whose window of {window_size} keys the cache still holds (older blocks are released), "
            f"got rows from position {int(earliest[gone.any(1)].min())} on"
        )
