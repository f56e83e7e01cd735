"""Compression of full blocks: which blocks of a stage become pages, and with which widths and order of K's channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import TurboConfig
from ..uploads import upload
from .channel_order import ChannelOrder, channel_order
from .layout import PageLayout
from .pages import Tiles, decode_pages
from .quantizer import quantizer_for
from .stage1 import Stage
from .widths import mixed_head_bits

if TYPE_CHECKING:
    from .cache import KVCache


@dataclass(frozen=True)
class Flush:
    """Full blocks to be compressed into pages.

    batch, block: int64 [N] (CPU), sequence and block index of each row of `tiles` [N, H, B, D], ordered by sequence,
    then block.
    """

    batch: Tensor
    block: Tensor
    tiles: Tiles

    def where(self, chosen: Tensor) -> Flush:
        """The rows selected by a bool [N]."""
        rows = upload(chosen.nonzero().flatten(), self.tiles.k8.device)
        return Flush(self.batch[chosen], self.block[chosen], self.tiles.map(lambda x: x[rows]))


@dataclass(frozen=True)
class Encoded:
    """Encoded blocks: `pages` uint8 [N, page_bytes] in `layout`, one for each of the N rows of `flush`.

    order: the order of K's channels in `pages`, or None; rotated: whether INT8 rows are.
    """

    layout: PageLayout
    flush: Flush
    pages: Tensor
    order: ChannelOrder | None
    rotated: bool

    def decoded(self) -> Tiles:
        """Decode the pages: int8 [N, H, B, D] and scales, as stored."""
        return decode_pages(self.layout, self.pages)

    def floats(self) -> tuple[Tensor, Tensor]:
        """The dequantized k (without its mean) and v [N, H, B, D or Dv], as stored: rotated, or in K's order."""
        return Tiles(*quantizer_for(self.pages.device).decode_pages(self.layout, self.pages)).floats()


@dataclass(frozen=True)
class Compression:
    """What committing a stage compresses.

    head_bits: int64 [2, Hkv], the widths of blocks after the sinks; None while no such block is full. order: the order
    of K's channels in them, or None. decides: whether the cache's first such block is among them, so that committing
    fixes widths and order for all later ones.
    """

    flush: Flush
    head_bits: Tensor | None
    order: ChannelOrder | None
    decides: bool

    def of(self, flush: Flush) -> Compression:
        """The same for other blocks."""
        return replace(self, flush=flush)

    def at(self, head_bits: Tensor) -> Compression:
        """The same at other widths, int64 [2, Hkv]."""
        return replace(self, head_bits=head_bits)


def compression_of(cache: KVCache, staged: Stage) -> Compression:
    """The blocks that committing `staged` compresses. Widths and order that are fixed do not change; otherwise they are
    the user's, or determined by tokens and queries."""
    flush, sink_blocks = _full_blocks(cache.config, staged), cache.sink_blocks
    assert cache.page_table is not None  # allocated by staging
    pools = cache.page_table.pools
    if cache.frozen or not bool((flush.block >= sink_blocks).any()):
        return Compression(flush, pools.head_bits, pools.order, False)
    bits, order = cache.configured_bits, cache.given_order
    if bits is not None and not cache.learns_order:
        return Compression(flush, bits, order, True)
    k, v = flush.where(flush.block == sink_blocks).tiles.floats()
    if cache.learns_order:
        order = channel_order(cache.restore(k), staged.query_energy)
    if bits is None:
        if staged.k_mean is not None and sink_blocks * cache.config.block_size >= cache.mean_from:
            first = upload(flush.batch[flush.block == sink_blocks], k.device)
            k = k + staged.k_mean.to(k.dtype)[first][:, :, None]
        bits = mixed_head_bits(cache.config, cache.restore(k), cache.restore(v))
    return Compression(flush, bits, order, True)


def _full_blocks(config: TurboConfig, staged: Stage) -> Flush:
    """The blocks of a stage that are full and followed by at least `flush_lag` tokens."""
    size, tiles = config.block_size, staged.stored
    full = (staged.lengths - staged.start - config.flush_lag).clamp(min=0) // size
    width = tiles.k8.shape[2] // size
    batch, block = (torch.arange(width) < full[:, None]).nonzero(as_tuple=True)
    at = upload(batch, tiles.k8.device), slice(None), upload(block, tiles.k8.device)
    picked = tiles.map(lambda x: x.unflatten(2, (width, size))[at])
    single = replace(picked, k_scale=picked.k_scale.float(), v_scale=picked.v_scale.float())
    return Flush(batch, block + staged.start[batch] // size, single)
