"""Dequantizes a whole cache, for inspection and tests. Attention never does this."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        tiles = cache.page_tiles(0, pages)
        for target, values in zip((k, v), tiles.floats(), strict=True):
            target[:, :, : pages * size] = values.transpose(1, 2).flatten(2, 3)
    positions = torch.arange(blocks * size)
    known = cache.readable_pages(blocks).repeat_interleave(size, 1)
    if state.open_tiles is not None:
        is_open = (positions >= state.start[:, None]) & (positions < state.lengths[:, None])
        batch, position = is_open.nonzero(as_tuple=True)
        row = position - state.start[batch]
        for target, values in zip((k, v), state.open_tiles.floats(), strict=True):
            target[batch, :, position] = values[batch, :, row]
        known |= is_open
    if state.k_mean is not None:
        smoothed = positions >= cache.mean_from
        k = k + state.k_mean[:, :, None] * smoothed.to(device)[:, None]
    mask = known.to(device)[:, None, :, None]
    dtype = cache.dtype or torch.float32
    restored = cache.restore_keys(k), cache.restore(v)
    k, v = (torch.where(mask, x, 0.0)[:, :, : len(cache)].to(dtype) for x in restored)
    return k, v
