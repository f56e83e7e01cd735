"""The loop over blocks that prefill and decode share (numerics.md section 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kv.queries import Queries, ordered_queries, quantize_queries
from .online_softmax import Accumulator, online_softmax_update
from .sources import Source
from .visibility import Visibility

# Scores computed at once: bounds memory, and is about what fits in a processor's cache.
_SCORES_AT_ONCE = 1 << 21


def attend(
    config: TurboConfig,
    q: Tensor,
    source: Source,
    seen: Visibility,
    scale: float,
    softcap: float | None,
    kv_heads: int,
    v_head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, Lq, D] (finite) over INT8 tiles: out [B, Hq, Lq, Dv], lse [B, Hq, Lq] (natural log).

    Integer products are computed in floating point, where they are exact: sums are at most 512 * 119 * 127 < 2^24.
    """
    queries = quantize_queries(config, q, kv_heads, scale, source.k_mean)
    ordered = queries
    if source.k_order is not None:
        ordered = ordered_queries(config, q, kv_heads, scale, source.k_order, queries)
    state = Accumulator.empty(queries.codes, v_head_dim)
    size, group = config.block_size, queries.codes.shape[2]
    at_once = max(1, _SCORES_AT_ONCE // max(1, size * q.shape[0] * q.shape[1] * q.shape[2]))
    for first, last in source.runs(at_once):
        rows = seen.rows(first * size, last * size, size)
        if rows.start == rows.stop:
            continue
        for tiles, in_order, own in source.views(first, last):
            logits = _logits(queries, tiles.k8, tiles.k_scale, rows)
            if bool(in_order.any()):
                chosen = in_order.to(logits.device)[:, None, :, None, None, None]
                logits = torch.where(chosen, _logits(ordered, tiles.k8, tiles.k_scale, rows), logits)
            _add_mean(logits, queries, rows, first, size, source.mean_from)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = seen.apply(logits, first * size, rows, group, own)
            v8 = tiles.v8.transpose(1, 2).to(logits.dtype)
            online_softmax_update(config, state, rows, logits, v8, tiles.v_scale.transpose(1, 2).to(logits.dtype))
    return state.finish()


def _logits(queries: Queries, k8: Tensor, k_scale: Tensor, rows: slice) -> Tensor:
    """`s_Q s_K scale (Q8 K8^T)`: [B, H, n, g, r, T] from tiles [B, n, H, T, D]."""
    codes = queries.codes[:, :, :, rows]
    keys = k8.transpose(1, 2).to(codes.dtype)
    product = codes.flatten(2, 3)[:, :, None] @ keys.transpose(-1, -2)
    unit = queries.scale[:, :, None, :, rows, None] * k_scale.transpose(1, 2).to(codes.dtype)[:, :, :, None, None]
    return product.unflatten(3, codes.shape[2:4]).mul_(unit)


def _add_mean(logits: Tensor, queries: Queries, rows: slice, first: int, size: int, mean_from: int) -> None:
    """Add `scale q . mu` in blocks whose keys are stored without their mean, since softcap and lse need true logits."""
    if queries.mean_logit is not None:
        start = max(0, -(-mean_from // size) - first)
        logits[:, :, start:] += queries.mean_logit[:, :, None, :, rows, None]
