"""Whole decode steps, captured and not, step by step over block flushes; and what storing costs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from plan import Plan
from problem import dtype, exact, filled_cache, normals
from timing import WRONG, attempted, each_call, graphed, on_gpu, once, relative_error, wrong

import turboattention as ta
from turboattention.benchmarking.records import Row
from turboattention.benchmarking.statistics import spread
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.impl.triton.host_lengths import Fills
from turboattention.impl.triton.steps import steps_of
from turboattention.params import AttentionParams

_STEPS = 192


def rows(plan: Plan, peaks: dict[str, float]) -> Iterator[Row]:
    steps = _STEPS if on_gpu() else 3
    with torch.inference_mode():
        for batch, tokens in plan.graph:
            shape = {
                "batch": batch,
                "keys": tokens,
                "heads": plan.heads,
                "kv_heads": plan.kv_heads,
                "head_dim": plan.head_dim,
                "steps": steps,
            }
            yield attempted(functools.partial(_steps, plan, batch, tokens, steps, shape), "graph", shape, "4")


def _steps(plan: Plan, batch: int, tokens: int, count: int, shape: dict) -> Row:
    config = ta.TurboConfig(guard="off")
    held = filled_cache(batch, plan.kv_heads, plan.head_dim, tokens, config, max_tokens=tokens + 2 * count + 64)
    q = normals(batch, plan.heads, 1, plan.head_dim, seed=1)
    k, v = (normals(batch, plan.kv_heads, 1, plan.head_dim, seed=seed) for seed in (2, 3))
    eager = each_call(lambda: ta.turbo_attention_with_kvcache(q, held, k, v, backend="triton"), count)
    graph = DecodeGraph(held, plan.heads, capture=on_gpu())
    error = None
    if batch * tokens <= 1 << 18:  # memory of floats
        out, _ = graph.step(q, k, v)
        error = relative_error(out[:1], exact(q[:1], *(x[:1] for x in held.dequantize()), False))
        if not error <= WRONG:
            return wrong("graph", shape, "4", error)
    seconds = each_call(lambda: graph.step(q, k, v), count)
    alone = steps_of(held)
    assert alone is not None
    params = AttentionParams(True, plan.head_dim**-0.5)
    attending = once(graphed(functools.partial(alone.run, q, None, None, params, fills=Fills())))
    # A flush ends each run of 64 steps.
    flush = max(seconds)
    mean = sum(seconds) / len(seconds)
    graph.close()
    figures = {
        "eager step": spread(eager).median,
        "attention alone": attending,
        "storing and flushing of a step": max(0.0, mean - attending) / mean,
        "slowest step over the median": flush / spread(seconds).median,
    }
    return Row("graph", shape, "4", "turboattention triton", str(dtype()), error, spread(seconds), figures=figures)
