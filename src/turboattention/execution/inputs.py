"""From caches and stages to what attention kernels read (`kernels.inputs`), on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.inputs import Int8Queries, OpenRows, Pages, Standing
from ..kv.growth import Growing
from ..kv.staging import SequenceState, Stage, fresh_state, stage
from ..kv.store import PageStore
from ..reference.queries import quantize_queries


def prefill_of(config: TurboConfig, q: Tensor, k: Tensor, v: Tensor) -> tuple[Standing, Stage]:
    """q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] without a cache: where the queries stand (on the host), and the keys."""
    batch, queries = q.shape[0], q.shape[2]
    kv_heads, keys, head_dim = k.shape[1:]
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    return Standing(torch.full((batch,), keys - queries), torch.full((batch,), queries), staged.lengths), staged


def standing_of(positions: Tensor, valid: Tensor, state: Stage | SequenceState) -> Standing:
    """Where rows at `positions` (int64 [B, Lq]) stand, of which those `valid` (bool) count, on the host. Both are runs:
    every row stands one behind the last, and rows of padding stand at the end."""
    first = positions[:, 0].contiguous() if positions.shape[1] else torch.zeros(len(positions), dtype=torch.int64)
    return Standing(first, valid.sum(1), state.lengths.contiguous())


def pages_of(cache: Growing) -> Pages | None:
    """The cache's page tables, on the host; None where it has no page."""
    store = cache.store
    return None if store is None or not bool(store.counts.any()) else tables_of(store)


def tables_of(store: PageStore) -> Pages:
    """The same of a store that may have no page yet."""
    compressed = store.compressed.layout if store.compressed is not None else None
    return Pages(store.addresses(), store.counts, store.sink_blocks, store.sinks.layout, compressed)


def open_rows_of(state: Stage | SequenceState, device: torch.device) -> OpenRows | None:
    """The rows behind the pages; None where none are."""
    tiles = state.tiles if isinstance(state, Stage) else state.open_tiles
    if tiles is None:
        return None
    tiles = tiles.map(lambda x: x.contiguous())
    return OpenRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, state.start.to(device).contiguous())


def queries_by_tile(
    config: TurboConfig, q: Tensor, valid: Tensor, kv_heads: int, scale: float, k_mean: Tensor | None
) -> Int8Queries:
    """Without token scales, tiles of rows share one: only to compare with, so it may take its time.

    q [B, Hq, Lq, D], of which the first `valid[b]` rows (int64 [B], CPU) count; k_mean [B, Hkv, D] (rotated space).
    """
    padding = (torch.arange(q.shape[2]) >= valid[:, None]).to(q.device)
    clean = q.float().masked_fill(padding[:, None, :, None], 0)
    tiles = quantize_queries(config, clean, kv_heads, scale, k_mean)
    mean_logit = None if tiles.mean_logit is None else tiles.mean_logit.contiguous()
    return Int8Queries(tiles.codes.to(torch.int8).contiguous(), tiles.scale.contiguous(), mean_logit)
