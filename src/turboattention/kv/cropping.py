"""Crops: the rows that return to the buffer, and the check against evicted blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .buffer import Int8Buffer
from .pages import Tiles
from .store import CROPPED, PageStore


def rows_behind(store: PageStore, buffer: Int8Buffer, target: Tensor, kept: Tensor) -> Tiles:
    """The INT8 rows after the first `kept` pages (int64 [B]) of each sequence, [B, H, rows, D].

    They are restored from the next page if the new length `target` (int64 [B]) cuts into it, else they are the buffered
    rows.
    """
    rows, counts = buffer.tiles(), store.counts
    reopened = (kept < counts) & (target > kept * store.config.block_size)
    if not bool(reopened.any()):
        return rows
    rows = rows.map(lambda x: _pad_tokens(x, buffer.capacity))
    at = torch.where(reopened, kept, kept[reopened][0])
    blocks = at.unique()
    tiles = Tiles.cat([store.rows(int(block)).map(lambda x: x[:, None]) for block in blocks], 1)
    chosen = torch.searchsorted(blocks, at)
    pages = tiles.map(lambda x: _pad_tokens(x[torch.arange(len(at)), chosen], buffer.capacity))
    mask = reopened.to(rows.k8.device)
    return Tiles(
        torch.where(mask[:, None, None, None], pages.k8, rows.k8),
        torch.where(mask[:, None, None, None], pages.v8, rows.v8),
        torch.where(mask[:, None, None], pages.k_scale, rows.k_scale),
        torch.where(mask[:, None, None], pages.v_scale, rows.v_scale),
    )


def check_crop(store: PageStore, lengths: Tensor, target: Tensor, kept: Tensor, window: int | None) -> None:
    """Raise InputError if queries after a crop to `target` would see blocks that a sliding window evicted."""
    if window is None:
        return
    size = store.config.block_size
    needed = (target - window + 1).clamp(min=0) // size
    present = store.present(int(store.counts.max()) if len(target) else 0)
    last = torch.minimum(kept + (target > kept * size), store.counts)
    columns = torch.arange(present.shape[1])
    wanted = (columns >= needed[:, None]) & (columns < last[:, None])
    if bool((wanted & ~present).any()):
        raise InputError(
            f"length: expected a crop of at most {CROPPED} tokens behind a window of {window} (older blocks were "
            f"released), got {target.tolist()} of {lengths.tolist()}"
        )


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """Truncate x [B, H, n, ...], or pad it with zeros, to `length` tokens."""
    out = x.new_zeros(*x.shape[:2], length, *x.shape[3:])
    rows = min(length, x.shape[2])
    out[:, :, :rows] = x[:, :, :rows]
    return out
