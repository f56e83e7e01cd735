"""What tests of the Triton attention share: a call of the launcher, held to the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import turboattention as ta
from turboattention.impl.inputs import pages_of
from turboattention.kernels.inputs import Int8Queries, QueryPositions, TailRows
from turboattention.kv.cache import KVCache
from turboattention.kv.queries import Queries, ordered_queries, quantize_queries
from turboattention.kv.stage1 import stage
from turboattention.params import AttentionParams
from turboattention.reference.decode import attend_cache

from ...helpers import normals
from .tools import Pair, assert_close

from turboattention.kernels.triton.attention import attend  # isort: skip

OFF = ta.TurboConfig(guard="off")


def filled(lengths: list[int], head_dim: int = 16, config: ta.TurboConfig = OFF, heads: int = 2, **options) -> KVCache:
    """A cache whose keys have an outlier channel, and whose values differ in size; keys of every other head have
    channels that differ enough for two widths."""
    cache = KVCache(len(lengths), heads, head_dim, config=config, **options)
    if lengths and max(lengths):
        k = normals(len(lengths), heads, max(lengths), head_dim, seed=9)
        v = normals(len(lengths), heads, max(lengths), cache.v_head_dim, seed=10)
        k[..., 1] += 4.0
        k[:, ::2, :, ::3] *= 4.0
        v[..., ::5, :] *= 6.0
        cache.append(k, v, torch.tensor(lengths))
    return cache


def both(q: Tensor, cache: KVCache, new: tuple[Tensor, Tensor] | None = None, **options: Any) -> Pair:
    """q [B, Hq, Lq, D] over a cache, and over new tokens behind it: by the kernels, checked against the reference."""
    got, want = kernels_and_reference(q, cache, new, **options)
    assert_close(got, want)
    return got


def kernels_and_reference(
    q: Tensor,
    cache: KVCache,
    new: tuple[Tensor, Tensor] | None = None,
    *,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Pair, Pair]:
    """Rows stand at the end, of the tokens that `valid` [B] counts, or from `first` [B] on."""
    config, batch, queries = cache.config, len(q), q.shape[2]
    valid = torch.full((batch,), queries) if valid is None else valid
    state = cache.state(q.device)
    staged = None if new is None else stage(config, state, *new, valid)
    lengths = state.lengths if staged is None else staged.lengths
    tiles = state.tail_tiles if staged is None else staged.tiles
    first = lengths - valid if first is None else first
    factor = q.shape[3] ** -0.5 if scale is None else scale
    rows = torch.arange(queries) < valid[:, None]
    clean = q.float().masked_fill(~rows[:, None, :, None], 0)
    stands = state if staged is None else staged
    mean = stands.k_mean
    codes, ordered = quantize_queries(config, clean, cache.num_kv_heads, factor, mean), None
    if cache.k_order is not None:
        ordered = ordered_queries(config, clean, cache.num_kv_heads, factor, cache.k_order, codes)
    params = AttentionParams(causal, factor, window, softcap, mask)
    got = attend(
        config,
        q,
        QueryPositions(first, valid, lengths),
        pages_of(cache),
        None if tiles is None else TailRows(tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, state.start),
        params,
        kv_heads=cache.num_kv_heads,
        v_head_dim=cache.v_head_dim,
        mean=mean,
        mean_from_block=cache.mean_from // config.block_size,
        quantized=Int8Queries(*_int8(codes), codes.mean_logit, *_int8(ordered)),
    )
    want = attend_cache(
        q,
        cache,
        staged,
        params,
        compression=None,
        positions=first[:, None] + torch.arange(queries),
        valid=rows,
    )
    return got, want


def _int8(x: Queries | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Codes and units as kernels take them."""
    return (None, None) if x is None else (x.codes.to(torch.int8).contiguous(), x.scale.contiguous())
