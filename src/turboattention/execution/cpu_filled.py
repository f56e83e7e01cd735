"""Backend "cpu" under `stored_prefill`: the pages of blocks that a call fills, before they belong to the cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.inputs import Pages
from ..kv.cache import KVCache
from ..kv.staging import Stage
from .inputs import tables_of


def with_filled(pages: Pages | None, cache: KVCache, staged: Stage, head_bits: Tensor | None) -> Pages | None:
    """The cache's page tables and, behind them, the blocks that committing `staged` compresses; None without any.

    `head_bits`, int64 [2, Hkv], where widths are not frozen yet and were decided already.
    """
    flush = cache.pending_flush(staged)
    if head_bits is None and cache.freezes_widths(flush):
        head_bits = cache.planned_bits(staged, flush)
    parts = cache.encode(flush, head_bits)
    if not parts:
        return pages
    store = cache.store
    assert store is not None  # staging made it
    known = pages or tables_of(store)
    counts = known.counts + torch.bincount(flush.batch, minlength=cache.batch_size)
    width = known.addresses.shape[1]
    addresses = known.addresses.new_zeros(cache.batch_size, max(width, int(counts.max())))
    addresses[:, :width] = known.addresses
    compressed = known.compressed
    for part in parts:
        rows = torch.arange(len(part.pages)) * part.pages.stride(0)
        addresses[part.flush.batch, part.flush.block] = part.pages.data_ptr() + rows
        if int(part.flush.block[0]) >= store.sink_blocks:
            compressed = part.layout
    kept = tuple(part.pages for part in parts)
    return replace(known, addresses=addresses, counts=counts, compressed=compressed, kept=kept)
