"""Exact attention in float64, against which errors are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from .visibility import Visibility


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window_size: int | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale q k^T) v` without tiles or quantization.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv], any floating dtype. Hkv divides Hq.
        attn_mask, is_causal, window_size, softcap: as in `turboattention.turbo_attention`.
        lengths: int64 [B], keys of each sequence, default all; the last query is aligned to the last key.

    Returns:
        float64 out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] (natural log). Rows without visible keys give 0 and -inf.
    """
    q, k, v = (x.to(torch.float64) for x in (q, k, v))
    batch, heads, queries, head_dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    ends = torch.full((batch,), keys) if lengths is None else lengths.cpu()
    # The queries of a GQA group are rows of one product, so that keys and values are not copied for each head.
    scores = q.unflatten(1, (-1, group)).flatten(2, 3) @ k.transpose(-1, -2)
    scores = scores.unflatten(2, (group, queries)) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    attn_mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    seen = Visibility(ends[:, None] - queries + torch.arange(queries), ends, is_causal, window_size, attn_mask, heads)
    scores = seen.apply(scores[:, :, None], 0, slice(0, queries), group)[:, :, 0]
    row_max = scores.amax(-1, keepdim=True) if keys else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    weights = torch.exp(scores - torch.where(row_max == -torch.inf, 0.0, row_max))
    row_sum = weights.sum(-1, keepdim=True)
    out = (weights.flatten(2, 3) @ torch.where(_used(ends, keys, k), v, 0.0)).unflatten(2, (group, queries))
    out = out / torch.where(row_sum == 0, 1.0, row_sum)
    return out.flatten(1, 2), (row_max + row_sum.log()).squeeze(-1).flatten(1, 2)


def _used(ends: Tensor, keys: int, k: Tensor) -> Tensor:
    """Masks padding, which may contain NaN: 0 * NaN must not reach a sum."""
    return (torch.arange(keys) < ends[:, None]).to(k.device)[:, None, :, None]
