"""Backend "triton": stage 1, then attention on the GPU, over the same tensors and pages as on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.inputs import BLOCK, Pages, Standing
from ..kernels.triton.attention import attend, takes_many_rows
from ..kernels.triton.call import Fresh, padded
from ..kernels.triton.fresh import mean_of_first_block
from ..kernels.triton.ordering import Order
from ..kernels.triton.quantize import quantize_queries
from ..kv.cache import KVCache
from ..kv.channel_order import ChannelOrder
from ..kv.staging import MEAN_SKIPS, SequenceState, Stage
from ..reference.queries import logit_scale
from ..validation import check_finite
from .inputs import open_rows_of, prefill_of, queries_by_tile, standing_of
from .triton_device import on_own_device
from .triton_steps import step
from .triton_tables import pages_of

__all__ = ["attend_cache", "prefill", "step"]


@on_own_device
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
    """Attention without a cache: q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] -> out [B, Hq, Lq, D] in q's dtype, lse float32
    [B, Hq, Lq]. Inputs are checked; semantics as in reference/prefill.py."""
    kv_heads = k.shape[1]
    sight: dict[str, Any] = dict(causal=is_causal, window=window_size, softcap=softcap, mask=attn_mask)
    if config.token_scales and k.shape[2] and takes_many_rows(q.shape[1] // kv_heads, q.shape[2]):
        return _prefill_at_once(config, q, k, v, scale, sight)
    for name, x in (("k", k), ("v", v)):
        check_finite(name, x)
    standing, staged = prefill_of(config, q, k, v)
    return _attend(config, q, standing, None, staged, None, kv_heads=kv_heads, mean_from=1, scale=scale, **sight)


def _prefill_at_once(
    config: TurboConfig, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sight: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Prefill without waiting for the GPU. Values that are not finite make the results NaN; where kernels are
    interpreted, they raise NonFiniteError."""
    (batch, _, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    factor, flag = logit_scale(scale, head_dim), torch.zeros(1, dtype=torch.int32, device=q.device)
    mean = None
    if config.smooth_k and keys >= BLOCK:
        mean = mean_of_first_block(k, MEAN_SKIPS, padded(head_dim), config.rotate, flag)
    first, valid, lengths = (torch.full((batch,), n, device=q.device) for n in (keys - queries, queries, keys))
    quantized, _ = quantize_queries(q, kv_heads, valid, mean, factor, config.rotate, flag=flag)
    result = attend(
        config, q, Standing(first, valid, lengths), None, None, kv_heads=kv_heads, scale=factor, mean=mean, mean_from=1,
        quantized=quantized, fresh=Fresh(k, v, mean, flag), **sight,
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
    """Attention over a cache: out [B, Hq, Lq, D] in q's dtype, lse float32 [B, Hq, Lq].

    Inputs are checked; semantics as in reference/decode.py, `positions` and `valid` as in `standing_of`. `head_bits`
    is unused: it matters only with `stored_prefill`, which this backend refuses.
    """
    cache.look()
    state = staged if staged is not None else cache.state(q.device)
    return _attend(
        cache.config,
        q,
        standing_of(positions, valid, state),
        pages_of(cache),
        state,
        cache.k_order,
        kv_heads=cache.num_kv_heads,
        mean_from=cache.mean_from // cache.config.block_size,
        causal=is_causal,
        scale=scale,
        window=window_size,
        softcap=softcap,
        mask=attn_mask,
    )


def _attend(
    config: TurboConfig,
    q: Tensor,
    standing: Standing,
    pages: Pages | None,
    state: Stage | SequenceState,
    order: ChannelOrder | None,
    *,
    kv_heads: int,
    mean_from: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    factor = logit_scale(scale, q.shape[3])
    mean = None if state.k_mean is None else state.k_mean.contiguous()
    first, rows, lengths = (x.to(q.device) for x in (standing.first, standing.valid, standing.lengths))
    if config.token_scales:
        quantized, flag = quantize_queries(q, kv_heads, rows, mean, factor, config.rotate, Order.of(order, q))
    else:
        quantized, flag = queries_by_tile(config, q, standing.valid, kv_heads, factor, mean), None
    result = attend(
        config,
        q,
        Standing(first, rows, lengths),
        pages,
        open_rows_of(state, q.device),
        kv_heads=kv_heads,
        scale=factor,
        mean=mean,
        mean_from=mean_from,
        causal=causal,
        window=window,
        softcap=softcap,
        mask=mask,
        quantized=quantized,
    )
    if flag is not None and bool(flag):  # waits for the device, which is acceptable outside decode steps
        check_finite("q", q, standing.valid)
    return result
