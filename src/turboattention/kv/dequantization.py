"""Dequantizes a whole cache, for inspection and tests. Attention never does this."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .channel_order import restore_keys

if TYPE_CHECKING:
    from .cache import KVCache


def dequantize(cache: KVCache) -> tuple[Tensor, Tensor]:
    """k [B, Hkv, len(cache), D] and v [B, Hkv, len(cache), Dv] in `cache.dtype`, with the rotation undone and the mean
    added back.

    Positions past a sequence's length and in evicted blocks are zero.
    """
    device = cache.device or torch.device("cpu")
    state, size = cache.state(device), cache.config.block_size
    blocks = -(-len(cache) // size)
    k, v = (
        torch.zeros(cache.batch_size, cache.num_kv_heads, blocks * size, width, device=device)
        for width in (cache.head_dim, cache.v_head_dim)
    )
    counts = cache.page_counts
    pages = int(counts.max()) if len(counts) else 0
    if pages:
        for target, values in zip((k, v), _pages(cache, pages), strict=True):
            target[:, :, : pages * size] = values.transpose(1, 2).flatten(2, 3)
    positions = torch.arange(blocks * size)
    known = cache.readable_pages(blocks).repeat_interleave(size, 1)
    if state.tail_tiles is not None:
        in_tail = (positions >= state.start[:, None]) & (positions < state.lengths[:, None])
        batch, position = in_tail.nonzero(as_tuple=True)
        row = position - state.start[batch]
        for target, values in zip((k, v), state.tail_tiles.floats(), strict=True):
            target[batch, :, position] = cache.restore(values)[batch, :, row]
        known |= in_tail
    if state.k_mean is not None:
        smoothed = positions >= cache.mean_from
        k = k + cache.restore(state.k_mean.to(k.dtype))[:, :, None] * smoothed.to(device)[:, None]
    mask = known.to(device)[:, None, :, None]
    dtype = cache.dtype or torch.float32
    k, v = (torch.where(mask, x, 0.0)[:, :, : len(cache)].to(dtype) for x in (k, v))
    return k, v


def _pages(cache: KVCache, pages: int) -> tuple[Tensor, Tensor]:
    """k (without its mean), v [B, pages, Hkv, block, D] in the model's space."""
    sides = []
    split = min(cache.sink_blocks, pages)
    for first, last, order in ((0, split, None), (split, pages, cache.k_order)):
        if first < last:
            k, v = (x.flatten(0, 1) for x in cache.page_tiles(first, last).floats())
            restored = restore_keys(k, order, cache.config.rotate), cache.restore(v)
            sides.append([x.unflatten(0, (cache.batch_size, -1)) for x in restored])
    k, v = (torch.cat(parts, 1) for parts in zip(*sides, strict=True))
    return k, v
