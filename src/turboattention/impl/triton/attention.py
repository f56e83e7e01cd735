"""Attention on a GPU, over tensors and over caches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import TurboConfig
from ...kernels.inputs import BLOCK, Pages, QueryPositions
from ...kernels.triton.attention import attend, takes_prefill_rows
from ...kernels.triton.call import Fresh, padded
from ...kernels.triton.fresh import mean_of_first_block
from ...kernels.triton.ordering import Order
from ...kernels.triton.quantize import quantize_queries
from ...kv.cache import KVCache
from ...kv.channel_order import ChannelOrder
from ...kv.compression import Compression
from ...kv.stage1 import MEAN_SKIPS, SequenceState, Stage
from ...params import AttentionParams
from ...uploads import upload
from ...validation import check_finite
from ..inputs import prefill_of, queries_by_tile, query_positions_of, tail_rows_of
from .device import on_own_device
from .steps import step
from .tables import pages_of

__all__ = ["attend_cache", "prefill", "step"]


@on_own_device
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: TurboConfig,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Attention without a cache: q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv] in q's
    dtype, lse float32 [B, Hq, Lq]. Inputs are checked; semantics as in reference/prefill.py."""
    kv_heads = k.shape[1]
    if config.token_scales and k.shape[2] and takes_prefill_rows(q.shape[1] // kv_heads, q.shape[2]):
        return _prefill_at_once(config, q, k, v, params)
    query_positions, staged = prefill_of(config, q, k, v)
    return _attend(
        config,
        q,
        query_positions,
        None,
        staged,
        None,
        params,
        kv_heads=kv_heads,
        v_head_dim=v.shape[3],
        mean_from_block=1,
    )


def _prefill_at_once(
    config: TurboConfig, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Prefill without waiting for the GPU. Values that are not finite make the results NaN; where kernels are
    interpreted, they raise NonFiniteError."""
    (batch, _, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    mean = None
    if config.smooth_k and keys >= BLOCK:
        mean = mean_of_first_block(k, MEAN_SKIPS, padded(head_dim), config.rotate, flag)
    first, valid, lengths = (torch.full((batch,), n, device=q.device) for n in (keys - queries, queries, keys))
    quantized, _ = quantize_queries(q, kv_heads, valid, mean, params.scale, config.rotate, flag=flag)
    result = attend(
        config, q, QueryPositions(first, valid, lengths), None, None, params, kv_heads=kv_heads, v_head_dim=v.shape[3],
        mean=mean, mean_from_block=1, quantized=quantized, fresh=Fresh(k, v, mean, flag),
    )  # fmt: skip
    if q.device.type == "cpu" and bool(flag):
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_finite(name, x)
    return result


@on_own_device
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
    `compression` is unused: it matters only with `stored_prefill`, which this backend refuses.
    """
    cache.look()
    state = staged if staged is not None else cache.state(q.device)
    # The caller has looked for values of q that are not finite.
    told = torch.zeros(1, dtype=torch.int32, device=q.device)
    return attend_state(q, cache, state, query_positions_of(positions, valid, state), params, told)


def attend_state(
    q: Tensor,
    cache: KVCache,
    state: Stage | SequenceState,
    query_positions: QueryPositions,
    params: AttentionParams,
    flag: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache's pages and the INT8 rows behind them, without waiting for the device.

    flag: int32 [1] on the device, set to 1 if a row of q is not finite, which is read as zeros.
    """
    return _attend(
        cache.config,
        q,
        query_positions,
        pages_of(cache),
        state,
        cache.k_order,
        params,
        kv_heads=cache.num_kv_heads,
        v_head_dim=cache.v_head_dim,
        mean_from_block=cache.mean_from // cache.config.block_size,
        flag=flag,
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
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """With a `flag`, as in `attend_state`; without, raises NonFiniteError, for which the host waits."""
    mean = None if state.k_mean is None else state.k_mean.contiguous()
    first, rows, lengths = (
        upload(x, q.device) for x in (query_positions.first, query_positions.valid, query_positions.lengths)
    )
    found = None
    if config.token_scales:
        ordered = Order.of(order, q)
        quantized, found = quantize_queries(q, kv_heads, rows, mean, params.scale, config.rotate, ordered, flag)
    else:
        quantized = queries_by_tile(config, q, query_positions.valid, kv_heads, params.scale, mean)
    result = attend(
        config,
        q,
        QueryPositions(first, rows, lengths),
        pages,
        tail_rows_of(state, q.device),
        params,
        kv_heads=kv_heads,
        v_head_dim=v_head_dim,
        mean=mean,
        mean_from_block=mean_from_block,
        quantized=quantized,
    )
    if flag is None and found is not None and bool(found):
        check_finite("q", q, query_positions.valid)
    return result
