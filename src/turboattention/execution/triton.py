"""Backend "triton": stage 1, then attention on the GPU; the same tensors and pages as on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..config import TurboConfig
from ..kernels.inputs import Int8Queries, Pages, Standing
from ..kernels.triton.attention import attend
from ..kernels.triton.quantize import quantize_queries
from ..kv.cache import KVCache
from ..kv.staging import SequenceState, Stage
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
    """Checked inputs q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] -> out in q's dtype, lse float32; what they
    mean is in reference/prefill.py."""
    standing, staged = prefill_of(config, q, k, v)
    return _attend(
        config,
        q,
        standing,
        None,
        staged,
        kv_heads=k.shape[1],
        mean_from=1,
        causal=is_causal,
        scale=scale,
        window=window_size,
        softcap=softcap,
        mask=attn_mask,
    )


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
    """Checked inputs -> out [B, Hq, Lq, D] in q's dtype, lse float32 [B, Hq, Lq] (see reference/decode.py).

    `positions` and `valid` as for `standing_of`. `head_bits` is read under `stored_prefill` alone, which is refused.
    """
    cache.look()
    state = staged if staged is not None else cache.state(q.device)
    return _attend(
        cache.config,
        q,
        standing_of(positions, valid, state),
        pages_of(cache),
        state,
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
        codes, unit, mean_logit, flag = quantize_queries(q, kv_heads, rows, mean, factor, config.rotate)
        quantized = Int8Queries(codes, unit, mean_logit)
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
    if flag is not None and bool(flag):  # waits for the device: many rows, or a call that a mask slows anyway
        check_finite("q", q, standing.valid)
    return result
