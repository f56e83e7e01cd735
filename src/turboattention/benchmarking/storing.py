"""The cost of compression, and the size of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..api import turbo_attention_with_kvcache
from ..config import TurboConfig
from ..kv.cache import KVCache
from .problem import Shape, fill, make_problem
from .statistics import Spread, paired_ratio, spread
from .timing import Effort, alternate


@dataclass(frozen=True)
class Compression:
    """block: seconds to quantize and compress one block of tokens (both stages). decode: seconds of one step's
    attention. share: `block` per token divided by `decode`, paired. single: seconds to append one token,
    averaged over a whole block including its compression."""

    block: Spread
    decode: Spread
    share: Spread
    single: float


def measure_compression(shape: Shape, config: TurboConfig, backend: str, effort: Effort) -> Compression:
    """Compression in comparison with decode over `shape.keys` tokens."""
    problem = make_problem(shape)
    size = config.block_size
    over = fill(problem.k, problem.v, config)
    new = [torch.randn(shape.batch, shape.kv_heads, size, shape.head_dim) for _ in range(2)]
    # A separate aligned cache: every append fills exactly one block, and the cache for attention keeps its length.
    aligned = problem.k.shape[2] // size * size
    into = Growing(fill(problem.k[:, :, :aligned], problem.v[:, :, :aligned], config), limit=aligned + 256 * size)
    ones = [(new[0][:, :, i : i + 1], new[1][:, :, i : i + 1]) for i in range(size)]

    def block() -> None:
        into.cache().append(new[0], new[1])

    def tokens() -> None:
        cache = into.cache()
        for k, v in ones:
            cache.append(k, v)

    def decode() -> None:
        turbo_attention_with_kvcache(problem.q, over, backend=backend)

    with torch.no_grad():
        pairs = alternate(decode, block, effort)
        single = alternate(decode, tokens, effort)
    ratio = paired_ratio(pairs.b, pairs.a)
    share = Spread(ratio.median / size, ratio.p20 / size, ratio.p80 / size, ratio.count)
    return Compression(spread(pairs.b), spread(pairs.a), share, spread(single.b).median / size)


class Growing:
    """A cache for appending, which is reset to a copy of its initial state when it becomes too long."""

    def __init__(self, start: KVCache, limit: int):
        self._start, self._limit = start, limit
        self._now = start.clone()

    def cache(self) -> KVCache:
        if len(self._now) >= self._limit:
            self._now = self._start.clone()
        return self._now


def measure_memory(shape: Shape, config: TurboConfig) -> dict[str, float]:
    """All allocated bytes of a cache with `shape.keys` tokens, relative to 16-bit floats.

    With a window, relative to 16-bit floats of the tokens in it; `live_bytes` are those of a cache of only these.
    """
    problem = make_problem(shape)
    cache = fill(problem.k, problem.v, config, window_size=shape.window)
    live = shape.keys if shape.window is None else min(shape.keys, shape.window)
    elements = 2 * shape.batch * shape.kv_heads * live * shape.head_dim
    figures = {
        "bytes": cache.nbytes,
        "fp16_bytes": 2 * elements,
        "below_fp16": 2 * elements / cache.nbytes,
        "bits_per_element": 8 * cache.nbytes / elements,
    }
    if shape.window is not None:
        figures["live_bytes"] = fill(problem.k[:, :, -live:], problem.v[:, :, -live:], config).nbytes
    return figures
