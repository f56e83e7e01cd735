"""Attention in floating point, for the guard's sample, and for rows and heads that INT8 represents too coarsely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .flashq.symmetric import compute_dtype
from .params import AttentionParams


def float_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, params: AttentionParams, mask: Tensor | None = None
) -> Tensor:
    """`softmax(scale q k^T) v` in float32 (float64 for float64 q), whose error is far below that of INT8.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv].
        seen: bool, broadcastable to [B, Lq, Lk], on the device of q: the keys that each query sees.
        params: their scale and softcap apply; mask, window and causality are the caller's, in `seen` and `mask`.
        mask: bool or additive, broadcastable to [B, Hq, Lq, Lk], or None.

    Returns:
        [B, Hq, Lq, Dv]; rows without a visible key give 0.
    """
    q = compute_dtype(q)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if params.softcap is None:
        shown = seen[:, None] if seen.dim() == 3 else seen
        if mask is not None and mask.dtype == torch.bool:
            shown = shown & mask
        elif mask is not None:
            shown = mask.to(q.dtype).masked_fill(~shown, -torch.inf)
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=params.scale, enable_gqa=grouped)
    weights = torch.softmax(_logits(q, k, seen, params, mask), -1).nan_to_num(0.0)  # NaN in rows that see nothing
    group = q.shape[1] // k.shape[1]
    return (weights.unflatten(1, (-1, group)).flatten(2, 3) @ v).unflatten(2, (group, -1)).flatten(1, 2)


def float_lse(q: Tensor, k: Tensor, seen: Tensor, params: AttentionParams, mask: Tensor | None = None) -> Tensor:
    """The log-sum-exp of the logits of `float_attention`, [B, Hq, Lq]; -inf in rows without a visible key."""
    q = compute_dtype(q)
    return _logits(q, k.to(q.dtype), seen, params, mask).logsumexp(-1)


def _logits(q: Tensor, k: Tensor, seen: Tensor, params: AttentionParams, mask: Tensor | None) -> Tensor:
    """[B, Hq, Lq, Lk], -inf where a key is not visible."""
    # The queries of a GQA group are rows of one product, so that keys are not copied for each head.
    group, queries = q.shape[1] // k.shape[1], q.shape[2]
    logits = (q.unflatten(1, (-1, group)).flatten(2, 3) @ k.transpose(-1, -2)) * params.scale
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    logits = logits.unflatten(2, (group, queries)).flatten(1, 2)
    unseen = ~(seen[:, None] if seen.dim() == 3 else seen)
    if mask is not None and mask.dtype == torch.bool:
        unseen = unseen | ~mask
    elif mask is not None:
        logits = logits + mask.to(logits.dtype)
    return logits.masked_fill_(unseen, -torch.inf)


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
