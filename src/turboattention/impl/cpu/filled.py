"""Backend "cpu" with `stored_prefill`: pages for the blocks that a call fills, before they are committed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.inputs import Pages
from ...kv.cache import KVCache
from ...kv.channel_order import reorder
from ...kv.quantizer import quantizer_for
from ...kv.staging import Stage
from ..inputs import tables_of


def with_filled(
    pages: Pages | None, cache: KVCache, staged: Stage, head_bits: Tensor | None
) -> tuple[Pages | None, Stage]:
    """The cache's page tables extended by the blocks that committing `staged` would compress, and the stage.

    Keys of both are in the channel order that the commit would fix. Returns `pages` and `staged` unchanged if no block
    fills. head_bits: int64 [2, Hkv], the widths if they are decided but not frozen yet.
    """
    flush = cache.pending_flush(staged)
    if head_bits is None and cache.freezes_widths(flush):
        head_bits = cache.planned_bits(staged, flush)
    order = cache.planned_order(staged, flush)
    parts = cache.encode(flush, head_bits, order)
    if not parts:
        return pages, staged
    store = cache.store
    assert store is not None  # allocated by staging
    known = pages or tables_of(store)
    if order is not None:
        known, staged = _reordered_sinks(known, cache, order.places), _reordered(staged, order.places)
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
    kept = known.kept + tuple(part.pages for part in parts)
    return replace(known, addresses=addresses, counts=counts, compressed=compressed, kept=kept), staged


def _reordered(staged: Stage, order: Tensor) -> Stage:
    tiles = replace(staged.tiles, k8=reorder(staged.tiles.k8, order, 1))
    mean = None if staged.k_mean is None else reorder(staged.k_mean, order, 1)
    return replace(staged, tiles=tiles, k_mean=mean, k_order=order)


def _reordered_sinks(known: Pages, cache: KVCache, order: Tensor) -> Pages:
    """Replace all pages by copies with reordered keys. Before the order is fixed, all pages are sinks."""
    blocks = int(known.counts.max())
    if not blocks:
        return known
    tiles = cache.page_tiles(0, blocks)
    tiles = replace(tiles, k8=reorder(tiles.k8, order, 2)).map(lambda x: x.flatten(0, 1))
    sides = tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale
    copies = quantizer_for(sides[0].device).encode_pages(known.sinks, *sides, cache.config.search)
    places = copies.data_ptr() + torch.arange(len(copies)).view(-1, blocks) * copies.stride(0)
    addresses = known.addresses.clone()
    addresses[:, :blocks] = torch.where(addresses[:, :blocks] != 0, places, 0)
    return replace(known, addresses=addresses, kept=(copies,))
