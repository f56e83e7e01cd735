"""What a call over a cache must keep to, beside the tensor contract: its new tokens, and what windows have left."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError, ShapeError
from .kv.cache import KVCache
from .validation import check_lengths


def new_tokens(q: Tensor, k_new: Tensor | None, lengths: Tensor | None) -> Tensor:
    """int64 [B]: tokens each sequence takes. Raises InputError, ShapeError, DtypeError."""
    if k_new is None:
        if lengths is not None:
            raise InputError("lengths: expected None without k_new and v_new, got a tensor")
        return torch.zeros(len(q), dtype=torch.int64)
    if lengths is not None and (k_new.dim() != 4 or q.shape[2] != k_new.shape[2]):
        raise ShapeError(f"q: expected as many rows as k_new has tokens, with lengths, got {q.shape[2]} rows")
    return check_lengths(lengths, len(q), k_new.shape[2])


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
