"""Tensors and caches that several stages need."""

from __future__ import annotations

import torch
from torch import Tensor

import turboattention as ta

SEED = 0


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """bfloat16 on GPUs; Triton's interpreter truncates where it should round."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def normals(*shape: int, seed: int = SEED) -> Tensor:
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device(), dtype=torch.float32).to(dtype())


def filled_cache(
    batch: int, kv_heads: int, head_dim: int, tokens: int, config: ta.TurboConfig, max_tokens: int | None = None
) -> ta.KVCache:
    """A cache of `tokens` random tokens a sequence, appended in chunks; keys' channels differ as much
    as it takes for two widths a head."""
    cache = ta.KVCache(batch, kv_heads, head_dim, config=config, max_tokens=max_tokens, device=device(), dtype=dtype())
    chunk = max(64, min(4096, (1 << 28) // max(1, batch * kv_heads * head_dim)))
    for first in range(0, tokens, chunk):
        count = min(chunk, tokens - first)
        k, v = (normals(batch, kv_heads, count, head_dim, seed=2 * first + side) for side in range(2))
        cache.append(k * spread_of_keys(head_dim), v)
    return cache


def spread_of_keys(head_dim: int) -> Tensor:
    """[D]: every third channel four times the others; the mean square is about 1."""
    third = torch.arange(head_dim, device=device()) % 3 == 0
    return torch.where(third, 1.63, 0.41).to(dtype())


def repeated(cache: ta.KVCache, batch: int) -> ta.KVCache:
    """A cache of `batch` sequences like the only one of `cache`, each in pages of its own: as much memory and traffic
    as of different tokens, without quantizing them all."""
    wide = cache.clone()
    wide.reorder(torch.zeros(batch, dtype=torch.int64))
    table = wide.page_table
    assert table is not None
    for sinks in (True, False):
        pool = table.pools.sinks if sinks else table.pools.compressed
        part = table.pools.part(sinks)
        shared = table.pages[0][part]
        if pool is None or not shared:
            continue
        content = pool.gather(shared)
        for pages in table.pages:
            pages[part] = pool.allocate([len(shared)])
            pool.write(pages[part], content)
            pool.release(shared)
    return wide


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention in float32 of q [B, Hq, Lq, D] whose last row stands at the last key."""
    group, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    logits = q.float() @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    if causal:
        at = torch.arange(keys, device=q.device)
        logits.masked_fill_(at > at[keys - queries :, None], -torch.inf)
    return logits.softmax(-1) @ v
