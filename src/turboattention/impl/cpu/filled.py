"""Backend "cpu" with `stored_prefill`: pages for the blocks that a call fills, before they are committed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.inputs import Pages
from ...kv.cache import KVCache
from ...kv.channel_order import ChannelOrder
from ...kv.compression import compression_of
from ...kv.growth import encode
from ...kv.stage1 import Stage
from ..inputs import tables_of


def with_filled(
    pages: Pages | None, cache: KVCache, staged: Stage, head_bits: Tensor | None
) -> tuple[Pages | None, ChannelOrder | None]:
    """The cache's page tables extended by the blocks that committing `staged` would compress, and the order of K's
    channels in them.

    Returns `pages` if no block fills. head_bits: int64 [2, Hkv], the widths if they are decided but not frozen yet.
    """
    compression, order = compression_of(cache, staged, head_bits), cache.k_order
    flush, parts = compression.flush, encode(cache, compression)
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
    kept = known.kept + tuple(part.pages for part in parts)
    return replace(known, addresses=addresses, counts=counts, compressed=compressed, kept=kept), order
