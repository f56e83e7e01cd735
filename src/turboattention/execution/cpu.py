"""Backend "cpu": stage 1, then the C++ extension's attention, then the rotation undone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.cpu.attention import OpenRows, Pages, QueryRows, attend
from ..kernels.cpu.quantize import quantize_queries, restore_rows
from ..kv.cache import KVCache
from ..kv.staging import SequenceState, Stage, fresh_state, stage
from ..reference.queries import quantize_queries as quantize_by_tile


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: TurboConfig,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Checked inputs q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] -> out in q's dtype, lse float32; what they
    mean is in reference/prefill.py."""
    batch, _, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    first, valid = torch.full((batch,), keys - queries), torch.full((batch,), queries)
    rows = _query_rows(config, q, kv_heads, scale, staged.k_mean, first, valid)
    out, lse = attend(
        config,
        rows,
        staged.lengths,
        None,
        _open_rows(staged),
        mean_from=1,
        causal=is_causal,
        window=window_size,
        softcap=softcap,
        mask=attn_mask,
    )
    return _finish(config, out, q.dtype), lse.flatten(1, 2)


def attend_cache(
    q: Tensor,
    cache: KVCache,
    staged: Stage | None,
    *,
    head_bits: Tensor | None,
    positions: Tensor,
    valid: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Checked inputs -> out [B, Hq, Lq, D] in q's dtype, lse float32 [B, Hq, Lq] (see reference/decode.py).

    `positions` and `valid` are runs: every row stands one behind the last, and rows of padding
    stand at the end. `head_bits` is read under `stored_prefill` alone, which is refused.
    """
    config = cache.config
    state = staged if staged is not None else cache.state(q.device)
    first = positions[:, 0].contiguous() if positions.shape[1] else torch.zeros(len(q), dtype=torch.int64)
    counts = valid.sum(1)
    rows = _query_rows(config, q, cache.num_kv_heads, scale, state.k_mean, first, counts)
    out, lse = attend(
        config,
        rows,
        state.lengths.contiguous(),
        _pages(cache),
        _open_rows(state),
        mean_from=cache.mean_from // config.block_size,
        causal=is_causal,
        window=window_size,
        softcap=softcap,
        mask=attn_mask,
    )
    return _finish(config, out, q.dtype), lse.flatten(1, 2)


def _query_rows(
    config: TurboConfig,
    q: Tensor,
    kv_heads: int,
    scale: float | None,
    k_mean: Tensor | None,
    first: Tensor,
    valid: Tensor,
) -> QueryRows:
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if config.token_scales:
        codes, unit, mean_logit, _ = quantize_queries(q, kv_heads, valid, k_mean, factor, config.rotate)
        return QueryRows(codes, unit, mean_logit, first, valid)
    # Tiles of rows with one scale: only to compare with, so it may take its time.
    padding = torch.arange(q.shape[2]) >= valid[:, None]
    tiles = quantize_by_tile(config, q.float().masked_fill(padding[:, None, :, None], 0), kv_heads, factor, k_mean)
    codes, unit = tiles.codes.to(torch.int8).contiguous(), tiles.scale.contiguous()
    return QueryRows(codes, unit, None if k_mean is None else tiles.mean_logit, first, valid)


def _open_rows(state: Stage | SequenceState) -> OpenRows | None:
    tiles = state.tiles if isinstance(state, Stage) else state.open_tiles
    if tiles is None:
        return None
    tiles = tiles.map(lambda x: x.contiguous())
    return OpenRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, state.start.contiguous())


def _pages(cache: KVCache) -> Pages | None:
    store = cache.store
    if store is None or not bool(store.counts.any()):
        return None
    compressed = store.compressed.layout if store.compressed is not None else None
    return Pages(store.addresses(), store.counts, store.sink_blocks, store.sinks.layout, compressed)


def _finish(config: TurboConfig, out: Tensor, dtype: torch.dtype) -> Tensor:
    return restore_rows(out.flatten(1, 2), dtype, config.rotate)
