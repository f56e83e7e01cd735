"""Attention over a cache: pages in stored form, buffered and new tokens as INT8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flashq.symmetric import compute_dtype
from ..kv.cache import KVCache
from ..kv.compression import Compression
from ..kv.stage1 import Stage
from ..params import AttentionParams
from .attention import attend
from .sources import Source
from .visibility import Visibility


def attend_cache(
    q: Tensor,
    cache: KVCache,
    staged: Stage | None,
    params: AttentionParams,
    *,
    compression: Compression | None,
    positions: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache and new tokens; inputs are checked.

    q: [B, Hq, Lq, D]. staged: the new tokens, read as INT8, or None. positions, valid: int64 and bool [B, Lq]; rows
    that are not valid give 0 and -inf, whatever q contains there. compression: of `staged`, if that is not None.

    Returns out [B, Hq, Lq, Dv] in q's dtype, and lse [B, Hq, Lq] (natural log), float32 (float64 for float64 q).
    """
    config, size = cache.config, cache.config.block_size
    state = staged if staged is not None else cache.state(q.device)
    source = Source(state, cache if int(cache.page_counts.sum()) else None, size, cache.mean_from)
    if config.stored_prefill and compression is not None:
        source.read_back(cache, compression)
    causal, window, mask = params.is_causal, params.window_size, params.attn_mask
    seen = Visibility(positions, state.lengths, causal, window, mask, q.shape[1], valid)
    rows = valid.to(q.device)[:, None, :, None]
    clean = torch.where(rows, compute_dtype(q), 0.0)
    out, lse = attend(config, clean, source, seen, params, cache.num_kv_heads, cache.v_head_dim)
    out = torch.where(rows, cache.restore(out), 0.0).to(q.dtype)
    lse = torch.where(rows[..., 0], lse, -torch.inf)
    return out, lse if q.dtype == torch.float64 else lse.float()
