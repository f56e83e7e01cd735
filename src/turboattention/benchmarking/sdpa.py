"""The ways to call PyTorch's SDPA with grouped query heads, none of which is always the fastest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .timing import fastest


def grouped(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """SDPA with `enable_gqa`. Its causal flag is aligned to the top left, so Lq is Lk or 1."""
    return scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=True)


def can_fold(q: Tensor, kv_heads: int) -> bool:
    return q.shape[2] == 1 and q.shape[1] > kv_heads


def folded(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """A single query sees every key, so the query heads of a group can be the rows of one head: [B, Hkv, g, D]."""
    return scaled_dot_product_attention(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v)


def best(q: Tensor, k: Tensor, v: Tensor, causal: bool, *, folded: bool) -> tuple[str, Callable[[], Tensor]]:
    """The fastest call for these tensors, and its name. Heads are expanded before the call."""
    if folded:
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return "query heads as rows", lambda: scaled_dot_product_attention(rows, k, v)
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    causal = causal and q.shape[2] > 1
    ways = {
        "expanded": lambda: scaled_dot_product_attention(q, wide_k, wide_v, is_causal=causal),
        "enable_gqa": lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
    }
    with torch.no_grad():
        way = fastest(ways)
    return way, ways[way]
