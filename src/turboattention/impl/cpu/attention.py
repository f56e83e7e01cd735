"""Attention in the C++ extension, over tensors and over caches."""

from __future__ import annotations

from torch import Tensor

from ...config import TurboConfig
from ...errors import NonFiniteError
from ...kernels.cpu.attention import attend
from ...kernels.inputs import Pages, QueryPositions
from ...kv.cache import KVCache
from ...kv.channel_order import ChannelOrder
from ...kv.compression import Compression
from ...kv.stage1 import SequenceState, Stage
from ...params import AttentionParams
from ...validation import check_finite
from ..inputs import pages_of, prefill_of, queries_by_tile, query_positions_of, tail_rows_of
from .filled import with_filled
from .steps import step

__all__ = ["attend_cache", "prefill", "step"]


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: TurboConfig,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Attention without a cache: q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv] in q's
    dtype, lse float32 [B, Hq, Lq]. Inputs are checked; semantics as in reference/prefill.py."""
    query_positions, staged = prefill_of(config, q, k, v)
    return _attend(
        config,
        q,
        query_positions,
        None,
        staged,
        None,
        params,
        kv_heads=k.shape[1],
        v_head_dim=v.shape[3],
        mean_from_block=1,
    )


def attend_cache(
    q: Tensor,
    cache: KVCache,
    staged: Stage | None,
    params: AttentionParams,
    *,
    compression: Compression | None,
    positions: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache: out [B, Hq, Lq, Dv] in q's dtype, lse float32 [B, Hq, Lq].

    Inputs are checked; semantics as in reference/decode.py, `positions` and `valid` as in `query_positions_of`.
    `compression`: of `staged`, if that is not None.
    """
    config = cache.config
    state = staged if staged is not None else cache.state(q.device)
    pages, order = pages_of(cache), cache.k_order
    if config.stored_prefill and compression is not None:
        pages, order = with_filled(pages, cache, compression)
    return _attend(
        config,
        q,
        query_positions_of(positions, valid, state),
        pages,
        state,
        order,
        params,
        kv_heads=cache.num_kv_heads,
        v_head_dim=cache.v_head_dim,
        mean_from_block=cache.mean_from // config.block_size,
    )


def _attend(
    config: TurboConfig,
    q: Tensor,
    query_positions: QueryPositions,
    pages: Pages | None,
    state: Stage | SequenceState,
    order: ChannelOrder | None,
    params: AttentionParams,
    *,
    kv_heads: int,
    v_head_dim: int,
    mean_from_block: int,
) -> tuple[Tensor, Tensor]:
    mean = None if state.k_mean is None else state.k_mean.contiguous()
    quantized = None
    if not config.token_scales:
        quantized = queries_by_tile(config, q, query_positions.valid, kv_heads, params.scale, mean)
    try:
        return attend(
            config,
            q,
            query_positions,
            pages,
            tail_rows_of(state, q.device),
            params,
            kv_heads=kv_heads,
            v_head_dim=v_head_dim,
            mean=mean,
            mean_from_block=mean_from_block,
            order=order,
            quantized=quantized,
        )
    except NonFiniteError:
        check_finite("q", q, query_positions.valid)  # reports which values
        raise
