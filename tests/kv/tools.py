"""Caches built piece by piece, and functions that extract their content for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import turboattention as ta
from turboattention.kv.compression import compression_of
from turboattention.kv.growth import commit, stage
from turboattention.kv.stage1 import Stage

from ..helpers import normals

PLAIN = ta.TurboConfig(guard="off")


def tokens(
    batch: int, heads: int, length: int, head_dim: int, seed: int = 0, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """k, v [B, H, L, D] with outlier channels and tokens, as in real models."""
    k, v = (normals(batch, heads, length, head_dim, seed=2 * seed + i) for i in range(2))
    k[..., 1] += 6.0
    if length:
        k[:, :, 0] *= 4.0
        v[:, :, length // 2] *= 9.0
    return k.to(dtype), v.to(dtype)


def filled(
    lengths: Sequence[int], heads: int = 2, head_dim: int = 16, config: ta.TurboConfig = PLAIN, seed: int = 0, **options
) -> tuple[ta.KVCache, Tensor, Tensor]:
    """A cache of ragged sequences appended in one call, and the tokens: rows past a length are NaN."""
    k, v = tokens(len(lengths), heads, max(lengths, default=0), head_dim, seed)
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    cache = ta.KVCache(len(lengths), heads, head_dim, config=config, **options)
    cache.append(k, v, torch.tensor(lengths, dtype=torch.int64))
    return cache, k, v


def append_range(cache: ta.KVCache, k: Tensor, v: Tensor, starts: Sequence[int], ends: Sequence[int]) -> None:
    """Append tokens `starts[b] .. ends[b]` of each sequence; what pads the others is NaN."""
    cache.append(*part_of(k, v, starts, ends))


def part_of(k: Tensor, v: Tensor, starts: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    longest = max(counts, default=0)
    parts = []
    for x in (k, v):
        part = x.new_full((*x.shape[:2], longest, x.shape[3]), torch.nan)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            part[row, :, :count] = x[row, :, start : start + count]
        parts.append(part)
    return parts[0], parts[1], torch.tensor(counts, dtype=torch.int64)


def pages_of(cache: ta.KVCache, sequence: int) -> list[bytes | None]:
    """The bytes of every page of a sequence; None where it was evicted."""
    if cache.page_table is None:
        return []
    out: list[bytes | None] = []
    for block, page in enumerate(cache.page_table.pages[sequence]):
        pool = cache.page_table.pools.sinks if block < cache.sink_blocks else cache.page_table.pools.compressed
        out.append(None if page < 0 else bytes(pool.gather([page])[0].tolist()))
    return out


def sequence_content(cache: ta.KVCache, sequence: int) -> dict[str, object]:
    """All that the cache holds of one sequence, as plain values."""
    content: dict[str, object] = {"length": int(cache.seq_lens[sequence]), "pages": pages_of(cache, sequence)}
    if cache.tail is not None:
        for name in cache.tail.TENSORS:
            held = getattr(cache.tail, name)[sequence].float()
            rows = held.new_zeros(held.shape[0], cache.tail.capacity, *held.shape[2:])
            rows[:, : held.shape[1]] = held  # the rest is as if it were zero
            content[name] = rows.tolist()
    if cache.k_mean is not None:
        content["k_mean"] = cache.k_mean[sequence].tolist()
    if cache.universal is not None:
        content["universal"] = cache.universal[:, sequence].tolist()
    return content


def content(cache: ta.KVCache) -> dict[str, object]:
    """All that it holds, and how it is set up."""
    bits = cache.head_bits
    return {
        "sequences": [sequence_content(cache, b) for b in range(cache.batch_size)],
        "bits": None if bits is None else bits.tolist(),
        "config": cache.config,
        "window": cache.window_size,
        "dtype": cache.dtype,
    }


def pool_bytes(cache: ta.KVCache) -> int:
    pools = (cache.page_table.pools.sinks, cache.page_table.pools.compressed)
    return sum(pool.nbytes for pool in pools if pool is not None)


def live_pages(cache: ta.KVCache) -> int:
    """Pages that some sequence of some cache over the same pools uses."""
    pools = (cache.page_table.pools.sinks, cache.page_table.pools.compressed)
    return sum(len(pool._counts) for pool in pools if pool is not None)


def attend(cache: ta.KVCache, heads: int = 4, rows: int = 3, seed: int = 9, **options) -> tuple[Tensor, Tensor]:
    """Queries at the end of each sequence: out and lse."""
    q = normals(cache.batch_size, heads, rows, cache.head_dim, seed=seed, dtype=cache.dtype or torch.float32)
    return ta.turbo_attention_with_kvcache(q, cache, return_lse=True, **options)


def stage_of(cache: ta.KVCache, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Stage:
    """A stage of the cache's next tokens, of which `lengths` (int64 [B]) belong to each sequence, or all."""
    return stage(cache, k, v, lengths)


def append_by_stages(cache: ta.KVCache, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
    """`KVCache.append` without a backend's kernels for few tokens."""
    staged = stage_of(cache, k, v, lengths)
    commit(cache, staged, compression_of(cache, staged))
