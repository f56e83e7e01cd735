"""Backend "cpu" with `stored_prefill`: pages for the blocks that a call fills, before they are committed."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels.inputs import Pages
from ...kv.cache import KVCache
from ...kv.channel_order import ChannelOrder
from ...kv.compression import Compression
from ...kv.growth import encode
from ..inputs import tables_of


def with_filled(
    pages: Pages | None, cache: KVCache, compression: Compression
) -> tuple[Pages | None, ChannelOrder | None]:
    """The cache's page tables extended by the blocks that `compression` compresses, and the order of K's channels in
    them. Returns `pages` if no block fills."""
    order, flush, parts = cache.k_order, compression.flush, encode(cache, compression)
    if not parts:
        return pages, order
    assert cache.page_table is not None  # allocated by staging
    known = pages or tables_of(cache.page_table)
    counts = known.counts + torch.bincount(flush.batch, minlength=cache.batch_size)
    width = known.addresses.shape[1]
    addresses = known.addresses.new_zeros(cache.batch_size, max(width, int(counts.max())))
    addresses[:, :width] = known.addresses
    compressed = known.compressed
    for part in parts:
        rows = torch.arange(len(part.pages)) * part.pages.stride(0)
        addresses[part.flush.batch, part.flush.block] = part.pages.data_ptr() + rows
        if int(part.flush.block[0]) >= cache.sink_blocks:
            compressed, order = part.layout, part.order
    alive = known.alive + tuple(part.pages for part in parts)
    return replace(known, addresses=addresses, counts=counts, compressed=compressed, alive=alive), order
