"""Backend "cpu": stage 1, then the C++ extension's attention, then the rotation undone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kernels.cpu.attention import attend
from ..kernels.inputs import Int8Queries, OpenRows, Standing
from ..kv.cache import KVCache
from ..kv.staging import SequenceState, Stage, fresh_state, stage
from ..reference.queries import quantize_queries as quantize_by_tile
from ..validation import check_finite
from .cpu_filled import with_filled
from .cpu_steps import pages_of, step

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
    """Checked inputs q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] -> out in q's dtype, lse float32; what they
    mean is in reference/prefill.py."""
    batch, queries, head_dim = q.shape[0], q.shape[2], q.shape[3]
    kv_heads, keys = k.shape[1], k.shape[2]
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    standing = Standing(torch.full((batch,), keys - queries), torch.full((batch,), queries), staged.lengths)
    factor = _factor(scale, q)
    return _finite(
        q,
        standing.valid,
        attend(
            config,
            q,
            standing,
            None,
            _open_rows(staged),
            kv_heads=kv_heads,
            scale=factor,
            mean=staged.k_mean,
            mean_from=1,
            causal=is_causal,
            window=window_size,
            softcap=softcap,
            mask=attn_mask,
            quantized=_by_tile(config, q, standing.valid, kv_heads, factor, staged.k_mean),
        ),
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
    """Checked inputs -> out [B, Hq, Lq, D] in q's dtype, lse float32 [B, Hq, Lq] (see reference/decode.py).

    `positions` and `valid` are runs: every row stands one behind the last, and rows of padding
    stand at the end. `head_bits` are the widths that committing `staged` would freeze (read under `stored_prefill`
    alone).
    """
    config = cache.config
    state = staged if staged is not None else cache.state(q.device)
    first = positions[:, 0].contiguous() if positions.shape[1] else torch.zeros(len(q), dtype=torch.int64)
    standing = Standing(first, valid.sum(1), state.lengths.contiguous())
    factor = _factor(scale, q)
    mean = None if state.k_mean is None else state.k_mean.contiguous()
    pages = pages_of(cache)
    if config.stored_prefill and staged is not None:
        pages = with_filled(pages, cache, staged, head_bits)
    return _finite(
        q,
        standing.valid,
        attend(
            config,
            q,
            standing,
            pages,
            _open_rows(state),
            kv_heads=cache.num_kv_heads,
            scale=factor,
            mean=mean,
            mean_from=cache.mean_from // config.block_size,
            causal=is_causal,
            window=window_size,
            softcap=softcap,
            mask=attn_mask,
            quantized=_by_tile(config, q, standing.valid, cache.num_kv_heads, factor, mean),
        ),
    )


def _factor(scale: float | None, q: Tensor) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _finite(q: Tensor, valid: Tensor, result: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The kernels look at queries as they read them; what is wrong with one is said here."""
    if result is None:
        check_finite("q", q, valid)
    assert result is not None
    return result


def _by_tile(
    config: TurboConfig, q: Tensor, valid: Tensor, kv_heads: int, factor: float, k_mean: Tensor | None
) -> Int8Queries | None:
    """Without token scales, tiles of rows share one: only to compare with, so it may take its time."""
    if config.token_scales:
        return None
    padding = torch.arange(q.shape[2]) >= valid[:, None]
    clean = q.float().masked_fill(padding[:, None, :, None], 0)
    tiles = quantize_by_tile(config, clean, kv_heads, factor, k_mean)
    mean_logit = None if tiles.mean_logit is None else tiles.mean_logit.contiguous()
    return Int8Queries(tiles.codes.to(torch.int8).contiguous(), tiles.scale.contiguous(), mean_logit)


def _open_rows(state: Stage | SequenceState) -> OpenRows | None:
    tiles = state.tiles if isinstance(state, Stage) else state.open_tiles
    if tiles is None:
        return None
    tiles = tiles.map(lambda x: x.contiguous())
    return OpenRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, state.start.contiguous())
