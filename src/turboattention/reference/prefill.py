"""Attention without a cache: stage 1 only, over INT8 keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TurboConfig
from ..flashq import rotate
from ..flashq.symmetric import compute_dtype
from ..kv.stage1 import fresh_state, stage
from ..params import AttentionParams
from .attention import attend
from .sources import Source
from .visibility import Visibility


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: TurboConfig,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv] in q's dtype and lse [B, Hq, Lq]
    (natural log), float32 (float64 for float64 q). Inputs are checked.

    Never applies stage 2. A causal mask is aligned bottom-right: the last query sees all keys.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    k, v = compute_dtype(k), compute_dtype(v)
    empty = fresh_state(config, batch, kv_heads, head_dim, k.device, k.dtype)
    staged = stage(config, empty, k, v, torch.full((batch,), keys))
    source = Source(staged, None, config.block_size, config.block_size)
    positions = (keys - queries + torch.arange(queries)).expand(batch, -1)
    seen = Visibility(positions, staged.lengths, params.is_causal, params.window_size, params.attn_mask, heads)
    out, lse = attend(config, q, source, seen, params, kv_heads, v.shape[3])
    if config.rotate:
        out = rotate(out, inverse=True)
    return out.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()
