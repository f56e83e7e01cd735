"""The loop over blocks that prefill and decode share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kv.queries import Queries, ordered_queries, quantize_queries
from ..params import AttentionParams
from .fixed_point import fixed_values, fixed_weights, product_shift, takes_fixed_point
from .online_softmax import Accumulator, fold_blocks, online_softmax_update
from .sources import Source
from .visibility import Visibility

# Scores computed at once: bounds memory, and is about what fits in a processor's cache.
_SCORES_AT_ONCE = 1 << 21


def attend(
    config: TurboConfig,
    q: Tensor,
    source: Source,
    seen: Visibility,
    params: AttentionParams,
    kv_heads: int,
    v_head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, Lq, D] (finite) over INT8 tiles: out [B, Hq, Lq, Dv], lse [B, Hq, Lq] (natural log).

    Integer products are computed in floating point, where they are exact: sums are at most 512 * 119 * 127 < 2^24.
    """
    scale, softcap = params.scale, params.softcap
    queries = quantize_queries(config, q, kv_heads, scale, source.k_mean)
    ordered = queries
    if source.k_order is not None:
        ordered = ordered_queries(config, q, kv_heads, scale, source.k_order, queries)
    state = Accumulator.empty(queries.codes, v_head_dim)
    size, group = config.block_size, queries.codes.shape[2]
    softmax = config.softmax_on(q.device)
    fixed = softmax == "sas16" and takes_fixed_point(config, scale, softcap, seen.mask)
    at_once = max(1, _SCORES_AT_ONCE // max(1, size * q.shape[0] * q.shape[1] * q.shape[2]))
    for first, last in source.runs(at_once):
        rows = seen.rows(first * size, last * size, size)
        if rows.start == rows.stop:
            continue
        for tiles, in_order, own in source.views(first, last):
            scores = _scores(queries, ordered, in_order, tiles.k8, rows)
            k_scale = tiles.k_scale.transpose(1, 2).to(scores.products.dtype)
            v8, v_scale = (x.transpose(1, 2).to(scores.products.dtype) for x in (tiles.v8, tiles.v_scale))
            mean = _mean_logits(queries, scores.unit, rows, first, size, source.mean_from)
            if fixed:
                visible = seen.apply(torch.zeros_like(scores.products), first * size, rows, group, own) == 0
                weights = fixed_weights(scores.products, scores.unit, scores.shift, mean, k_scale, visible)
                row_sum, out = fixed_values(weights, v8, v_scale, config.p_scale == "row")
                fold_blocks(torch.exp, state.of(rows), weights.row_max, row_sum, out)
                continue
            logits = scores.products * (scores.unit[..., None] * k_scale[:, :, :, None, None])
            if mean is not None:
                logits += mean[..., None]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = seen.apply(logits, first * size, rows, group, own)
            online_softmax_update(config, softmax, state, rows, logits, v8, v_scale)
    return state.finish()


class _Scores(NamedTuple):
    """products: [B, H, n, g, r, T], exact. unit, shift: [B, H, n, g, r], of the queries (`fixed_point`)."""

    products: Tensor
    unit: Tensor
    shift: Tensor


def _scores(queries: Queries, ordered: Queries, in_order: Tensor, k8: Tensor, rows: slice) -> _Scores:
    """`Q8 K8^T` over tiles [B, n, H, T, D], of which those marked in `in_order` bool [B, n] take `ordered` queries."""
    keys = k8.transpose(1, 2).to(queries.codes.dtype)
    plain = _scores_of(queries, keys, rows)
    if not bool(in_order.any()):
        return plain
    chosen = in_order.to(keys.device)[:, None, :, None, None]
    other = _scores_of(ordered, keys, rows)
    return _Scores(
        torch.where(chosen[..., None], other.products, plain.products),
        torch.where(chosen, other.unit, plain.unit),
        torch.where(chosen, other.shift, plain.shift),
    )


def _scores_of(queries: Queries, keys: Tensor, rows: slice) -> _Scores:
    codes, blocks = queries.codes[:, :, :, rows], keys.shape[2]
    products = codes.flatten(2, 3)[:, :, None] @ keys.transpose(-1, -2)
    unit, shift = queries.scale[:, :, :, rows], product_shift(codes)
    spread = [x[:, :, None].expand(-1, -1, blocks, -1, -1) for x in (unit, shift)]
    return _Scores(products.unflatten(3, codes.shape[2:4]), *spread)


def _mean_logits(queries: Queries, unit: Tensor, rows: slice, first: int, size: int, mean_from: int) -> Tensor | None:
    """`scale q . mu` [B, H, n, g, r] in blocks whose keys are stored without their mean, else 0: softcap and lse need
    true logits. None without a mean."""
    if queries.mean_logit is None:
        return None
    mean = torch.zeros_like(unit)
    mean[:, :, max(0, -(-mean_from // size) - first) :] = queries.mean_logit[:, :, None, :, rows]
    return mean
