"""Backend "triton": stage 1, then attention on the GPU; the same tensors and pages as on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.inputs import Int8Queries, OpenRows, Pages, Standing
from ..kernels.triton.attention import attend
from ..kernels.triton.quantize import quantize_queries
from ..kv.cache import KVCache
from ..kv.staging import SequenceState, Stage, fresh_state, stage
from ..reference.queries import quantize_queries as quantize_by_tile
from ..validation import check_finite
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
    batch, queries, head_dim = q.shape[0], q.shape[2], q.shape[3]
    kv_heads, keys = k.shape[1], k.shape[2]
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    valid = torch.full((batch,), queries)
    return _attend(
        config,
        q,
        torch.full((batch,), keys - queries),
        valid,
        None,
        staged,
        kv_heads=kv_heads,
        mean=staged.k_mean,
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

    `positions` and `valid` are runs: every row stands one behind the last, and rows of padding
    stand at the end. `head_bits` is read under `stored_prefill` alone, which is refused.
    """
    cache.look()
    state = staged if staged is not None else cache.state(q.device)
    return _attend(
        cache.config,
        q,
        positions[:, 0] if positions.shape[1] else torch.zeros(len(q), dtype=torch.int64),
        valid.sum(1),
        pages_of(cache),
        state,
        kv_heads=cache.num_kv_heads,
        mean=state.k_mean,
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
    first: Tensor,
    valid: Tensor,
    pages: Pages | None,
    state: Stage | SequenceState,
    *,
    kv_heads: int,
    mean: Tensor | None,
    mean_from: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    mean = None if mean is None else mean.contiguous()
    first, rows, lengths = (x.to(q.device).contiguous() for x in (first, valid, state.lengths))
    if config.token_scales:
        codes, unit, mean_logit, flag = quantize_queries(q, kv_heads, rows, mean, factor, config.rotate)
        quantized = Int8Queries(codes, unit, mean_logit)
    else:
        quantized, flag = _by_tile(config, q, valid, kv_heads, factor, mean), None
    result = attend(
        config,
        q,
        Standing(first, rows, lengths),
        pages,
        _open_rows(state, q.device),
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
        check_finite("q", q, valid)
    return result


def _by_tile(
    config: TurboConfig, q: Tensor, valid: Tensor, kv_heads: int, factor: float, k_mean: Tensor | None
) -> Int8Queries:
    """Without token scales, tiles of rows share one: only to compare with, so it may take its time."""
    padding = (torch.arange(q.shape[2]) >= valid[:, None]).to(q.device)
    clean = q.float().masked_fill(padding[:, None, :, None], 0)
    tiles = quantize_by_tile(config, clean, kv_heads, factor, k_mean)
    mean_logit = None if tiles.mean_logit is None else tiles.mean_logit.contiguous()
    return Int8Queries(tiles.codes.to(torch.int8).contiguous(), tiles.scale.contiguous(), mean_logit)


def _open_rows(state: Stage | SequenceState, device: torch.device) -> OpenRows | None:
    tiles = state.tiles if isinstance(state, Stage) else state.open_tiles
    if tiles is None:
        return None
    tiles = tiles.map(lambda x: x.contiguous())
    return OpenRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, state.start.to(device).contiguous())
