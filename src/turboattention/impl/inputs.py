"""Converts caches and stages to the inputs of attention kernels (`kernels.inputs`), for all backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.inputs import Int8Queries, Pages, QueryPositions, TailRows
from ..kv.cache import KVCache
from ..kv.page_table import PageTable
from ..kv.queries import quantize_queries
from ..kv.stage1 import SequenceState, Stage, fresh_state, stage
from ..uploads import upload


def prefill_of(config: TurboConfig, q: Tensor, k: Tensor, v: Tensor) -> tuple[QueryPositions, Stage]:
    """Query positions (on the CPU) and staged keys of q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] without a cache."""
    batch, queries = q.shape[0], q.shape[2]
    kv_heads, keys, head_dim = k.shape[1:]
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    return QueryPositions(torch.full((batch,), keys - queries), torch.full((batch,), queries), staged.lengths), staged


def query_positions_of(positions: Tensor, valid: Tensor, state: Stage | SequenceState) -> QueryPositions:
    """Query positions (on the CPU) from `positions` int64 [B, Lq] and `valid` bool [B, Lq].

    The positions of a sequence must be consecutive, and its padding rows must come last.
    """
    first = positions[:, 0].contiguous() if positions.shape[1] else torch.zeros(len(positions), dtype=torch.int64)
    return QueryPositions(first, valid.sum(1), state.lengths.contiguous())


def pages_of(cache: KVCache) -> Pages | None:
    """The cache's page tables, on the CPU; None if it has no pages."""
    table = cache.page_table
    return None if table is None or not bool(table.counts.any()) else tables_of(table)


def tables_of(table: PageTable) -> Pages:
    """The page tables of a cache, which may have no pages yet."""
    pools = table.pools
    compressed = pools.compressed.layout if pools.compressed is not None else None
    return Pages(table.addresses(), table.counts, pools.sink_blocks, pools.sinks.layout, compressed)


def tail_rows_of(state: Stage | SequenceState, device: torch.device) -> TailRows | None:
    """The INT8 rows after the pages; None without a buffer."""
    tiles = state.tiles if isinstance(state, Stage) else state.tail_tiles
    if tiles is None:
        return None
    tiles = tiles.map(lambda x: x.contiguous())
    return TailRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, upload(state.start, device))


def queries_by_tile(
    config: TurboConfig, q: Tensor, valid: Tensor, kv_heads: int, scale: float, k_mean: Tensor | None
) -> Int8Queries:
    """Quantize queries with one scale per tile of rows, as in the paper. Not optimized: used for comparisons only.

    q: [B, Hq, Lq, D], of which rows from `valid[b]` (int64 [B], CPU) on are padding; k_mean: [B, Hkv, D] in stored
    space.
    """
    padding = (torch.arange(q.shape[2]) >= valid[:, None]).to(q.device)
    clean = q.float().masked_fill(padding[:, None, :, None], 0)
    tiles = quantize_queries(config, clean, kv_heads, scale, k_mean)
    mean_logit = None if tiles.mean_logit is None else tiles.mean_logit.contiguous()
    return Int8Queries(tiles.codes.to(torch.int8).contiguous(), tiles.scale.contiguous(), mean_logit)
