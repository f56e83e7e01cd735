"""Crops: the pages that remain, the rows that return to the tail buffer, and the check against evicted blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .page_table import PageTable
from .pages import Tiles
from .tail_buffer import TailBuffer
from .window import CROPPED, first_kept_blocks, tokens_seen

if TYPE_CHECKING:
    from .cache import KVCache


def crop(cache: KVCache, length: int | Tensor) -> None:
    """Remove tokens past `length`. Arguments and errors as in `KVCache.crop`."""
    target, kept = crop_target(cache, length)
    table, tail = cache.page_table, cache.tail
    if table is None or tail is None:
        return
    if not torch.equal(target, cache.lengths):
        cache.backend_state = None
        rows = _rows_after_pages(table, tail, target, kept)
        count = target - kept * cache.config.block_size
        tail.take(rows, torch.zeros_like(target), count, tokens_seen(target, cache.window_size))
        cache.lengths = target.clone()
        table.truncate(kept.tolist())
    # Nothing, unless the window was wider before.
    table.evict(first_kept_blocks(target, cache.window_size, cache.config.block_size).tolist())


def crop_target(cache: KVCache, length: int | Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B] twice: the new lengths, and the pages that are left of each sequence. Raises as `KVCache.crop`."""
    target, batch = torch.as_tensor(length).cpu(), cache.batch_size
    if target.is_floating_point() or target.dtype == torch.bool or target.shape not in ((), (batch,)):
        raise InputError(f"length: expected an integer or int64 [{batch}], got {length!r}")
    target = target.to(torch.int64).expand(batch)
    if bool((target < 0).any()):
        raise InputError(f"length: expected at least 0, got {int(target.min())}")
    target = torch.minimum(target, cache.lengths)
    kept = torch.minimum(target // cache.config.block_size, cache.page_counts)
    if cache.page_table is not None and not torch.equal(target, cache.lengths):
        _check_blocks_kept(cache.page_table, cache.lengths, target, kept, cache.window_size)
    return target, kept


def _check_blocks_kept(table: PageTable, lengths: Tensor, target: Tensor, kept: Tensor, window: int | None) -> None:
    """Raise InputError if queries after a crop from `lengths` to `target` with `kept` pages (int64 [B] each) would see
    blocks that a sliding window evicted."""
    if window is None:
        return
    size = table.config.block_size
    needed = (target - window + 1).clamp(min=0) // size
    present = table.present(int(table.counts.max()) if len(target) else 0)
    last = torch.minimum(kept + (target > kept * size), table.counts)
    columns = torch.arange(present.shape[1])
    wanted = (columns >= needed[:, None]) & (columns < last[:, None])
    if bool((wanted & ~present).any()):
        raise InputError(
            f"length: expected a crop of at most {CROPPED} tokens with a window of {window} (older blocks were "
            f"released), got {target.tolist()} of {lengths.tolist()}"
        )


def _rows_after_pages(table: PageTable, tail: TailBuffer, target: Tensor, kept: Tensor) -> Tiles:
    """The INT8 rows after the first `kept` pages (int64 [B]) of each sequence, [B, H, rows, D].

    They are restored from the next page if the new length `target` (int64 [B]) cuts into it, else they are the buffered
    rows.
    """
    rows, counts = tail.tiles(), table.counts
    reopened = (kept < counts) & (target > kept * table.config.block_size)
    if not bool(reopened.any()):
        return rows
    rows = rows.map(lambda x: _pad_tokens(x, tail.capacity))
    at = torch.where(reopened, kept, kept[reopened][0])
    blocks = at.unique()
    tiles = Tiles.cat([table.rows(int(block)).map(lambda x: x[:, None]) for block in blocks], 1)
    chosen = torch.searchsorted(blocks, at)
    pages = tiles.map(lambda x: _pad_tokens(x[torch.arange(len(at)), chosen], tail.capacity))
    mask = reopened.to(rows.k8.device)
    return Tiles(
        torch.where(mask[:, None, None, None], pages.k8, rows.k8),
        torch.where(mask[:, None, None, None], pages.v8, rows.v8),
        torch.where(mask[:, None, None], pages.k_scale, rows.k_scale),
        torch.where(mask[:, None, None], pages.v_scale, rows.v_scale),
    )


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """Truncate x [B, H, n, ...], or pad it with zeros, to `length` tokens."""
    out = x.new_zeros(*x.shape[:2], length, *x.shape[3:])
    rows = min(length, x.shape[2])
    out[:, :, :rows] = x[:, :, :rows]
    return out
