"""Backend "cpu": stage 1, then attention in the C++ extension."""

from __future__ import annotations

from torch import Tensor

from ..config import TurboConfig
from ..kernels.cpu.attention import attend
from ..kernels.inputs import Pages, Standing
from ..kv.cache import KVCache
from ..kv.staging import SequenceState, Stage
from ..reference.queries import logit_scale
from ..validation import check_finite
from .cpu_filled import with_filled
from .cpu_steps import step
from .inputs import open_rows_of, pages_of, prefill_of, queries_by_tile, standing_of

__all__ = ["attend_cache", "prefill", "step"]


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
    """Attention without a cache: q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv] in q's
    dtype, lse float32 [B, Hq, Lq]. Inputs are checked; semantics as in reference/prefill.py."""
    standing, staged = prefill_of(config, q, k, v)
    return _attend(
        config,
        q,
        standing,
        None,
        staged,
        kv_heads=k.shape[1],
        v_head_dim=v.shape[3],
        mean_from=1,
        causal=is_causal,
        scale=scale,
        window=window_size,
        softcap=softcap,
        mask=attn_mask,
    )


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
    """Attention over a cache: out [B, Hq, Lq, Dv] in q's dtype, lse float32 [B, Hq, Lq].

    Inputs are checked; semantics as in reference/decode.py, `positions` and `valid` as in `standing_of`. `head_bits`
    int64 [2, Hkv] are the widths that committing `staged` would freeze; used only with `stored_prefill`.
    """
    config = cache.config
    state = staged if staged is not None else cache.state(q.device)
    pages = pages_of(cache)
    if config.stored_prefill and staged is not None:
        pages, state = with_filled(pages, cache, staged, head_bits)
    return _attend(
        config,
        q,
        standing_of(positions, valid, state),
        pages,
        state,
        kv_heads=cache.num_kv_heads,
        v_head_dim=cache.v_head_dim,
        mean_from=cache.mean_from // config.block_size,
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
    v_head_dim: int,
    mean_from: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    factor = logit_scale(scale, q.shape[3])
    mean = None if state.k_mean is None else state.k_mean.contiguous()
    quantized = None
    if not config.token_scales:
        quantized = queries_by_tile(config, q, standing.valid, kv_heads, factor, mean)
    result = attend(
        config,
        q,
        standing,
        pages,
        open_rows_of(state, q.device),
        kv_heads=kv_heads,
        v_head_dim=v_head_dim,
        scale=factor,
        mean=mean,
        mean_from=mean_from,
        causal=causal,
        window=window,
        softcap=softcap,
        mask=mask,
        order=state.k_order,
        quantized=quantized,
    )
    if result is None:  # a kernel found a query that is not finite; this raises the error
        check_finite("q", q, standing.valid)
    assert result is not None
    return result
