"""Attention in floating point, for the guard's sample, and for rows and heads that INT8 represents too coarsely."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import AttentionParams


def float_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, params: AttentionParams, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`softmax(scale q k^T) v` in float32 (float64 for float64 q), whose error is far below that of INT8.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv].
        seen: bool, broadcastable to [B, Lq, Lk], on the device of q: the keys that each query sees.
        params: their scale and softcap apply; mask, window and causality are the caller's, in `seen` and `mask`.
        mask: bool or additive, broadcastable to [B, Hq, Lq, Lk], or None.

    Returns:
        out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] (natural log). Rows without a visible key give 0 and -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # The queries of a GQA group are rows of one product, so that keys and values are not copied for each head.
    group, queries = q.shape[1] // k.shape[1], q.shape[2]
    logits = (q.unflatten(1, (-1, group)).flatten(2, 3) @ k.transpose(-1, -2)) * params.scale
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    logits = logits.unflatten(2, (group, queries)).flatten(1, 2)
    unseen = ~(seen[:, None] if seen.dim() == 3 else seen)
    if mask is not None and mask.dtype == torch.bool:
        unseen = unseen | ~mask
    elif mask is not None:
        logits, unseen = logits + mask.to(dtype), unseen | (mask == -torch.inf)
    logits = logits.masked_fill_(unseen, -torch.inf)
    weights = torch.softmax(logits, -1).masked_fill_(unseen, 0.0)  # not NaN in rows that see nothing
    out = (weights.unflatten(1, (-1, group)).flatten(2, 3) @ v).unflatten(2, (group, queries)).flatten(1, 2)
    # The largest weight is exp(its logit - lse): no second pass of exponentials.
    largest = weights.amax(-1)
    return out, torch.where(largest > 0, logits.amax(-1) - largest.log(), -torch.inf)


def visible(positions: Tensor, keys: int, params: AttentionParams) -> Tensor:
    """Which of the keys 0 to `keys - 1` a query at each of the `positions` (int64 [..., Lq]) sees by causality and
    window: bool [..., Lq, keys]."""
    behind = positions[..., None] - torch.arange(keys)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if params.is_causal:
        seen &= behind >= 0
    if params.window_size is not None:
        seen &= (behind if params.is_causal else behind.abs()) < params.window_size
    return seen
