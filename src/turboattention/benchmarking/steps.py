"""Decode step by step: the cost of a step as the context grows, and of the steps that compress a block."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import turbo_attention_with_kvcache
from ..config import TurboConfig
from ..kv.cache import KVCache
from .problem import Shape, fill, make_problem
from .statistics import Spread, fit_line, spread

ROUNDS = 3
"""The time of a step is the minimum of this many runs over the same tokens, so that other activity on the machine is
not mistaken for the cost of a flush."""


@dataclass(frozen=True)
class Steps:
    """seconds: of steps that only append. `flush`, `worst`: relative to their median, the slowest step that
    compresses a block and the slowest step of all."""

    seconds: Spread
    flush: float
    worst: float


def measure_steps(shape: Shape, config: TurboConfig, backend: str, blocks: int) -> Steps:
    """As many steps as fill `blocks` blocks, from a context of `shape.keys` tokens on."""
    problem = make_problem(shape)
    start = fill(problem.k, problem.v, config)
    count = blocks * config.block_size
    generator = torch.Generator().manual_seed(1)
    new = [
        torch.randn(count, shape.batch, heads, 1, shape.head_dim, generator=generator)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    _run(start.clone(), new, backend, min(count, 4))
    best, flushed = _run(start.clone(), new, backend, count)
    for _ in range(ROUNDS - 1):
        best = [min(pair) for pair in zip(best, _run(start.clone(), new, backend, count)[0], strict=True)]
    plain = spread([seconds for seconds, flush in zip(best, flushed, strict=True) if not flush])
    flushes = [seconds for seconds, flush in zip(best, flushed, strict=True) if flush]
    return Steps(plain, max(flushes) / plain.median, max(best) / plain.median)


def _run(cache: KVCache, new: list[Tensor], backend: str, count: int) -> tuple[list[float], list[bool]]:
    """Seconds of each step, and whether it compressed a block."""
    seconds, flushed = [], []
    for q, k, v in zip(*(x[:count] for x in new), strict=True):
        before = int(cache.page_counts.sum())
        begun = time.perf_counter()
        turbo_attention_with_kvcache(q, cache, k, v, backend=backend)
        seconds.append(time.perf_counter() - begun)
        flushed.append(int(cache.page_counts.sum()) > before)
    return seconds, flushed


def linearity(lengths: list[int], medians: list[float]) -> dict[str, float]:
    """How closely the cost of a step is linear in the context length."""
    line = fit_line(lengths, medians)
    return {"seconds_per_token": line.slope, "seconds_at_zero": line.base, "deviation_from_line": line.deviation}
