"""One engine under one workload: the time of each token of each request."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import engine
from vllm.v1.engine.llm_engine import LLMEngine
from workload import Request, Workload, requests_of

from turboattention import bundled

Times = dict[str, list[float]]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    llm = engine.start(spec["options"])
    workload = Workload(**spec["workload"])
    _warm_up(llm, workload)
    before = engine.counters(llm)
    document = llm.get_tokenizer()(bundled.document()).input_ids if workload.vocabulary is None else ()
    requests = requests_of(workload, document)
    times, steps, seconds = serve(llm.llm_engine, requests, workload.alone)
    missing = [request.name for request in requests if len(times[request.name]) != request.output]
    assert not missing, f"not all tokens came: {missing}"
    counted = {name: value - before[name] for name, value in engine.counters(llm).items()}
    return {
        **engine.cache_facts(llm),
        **counted,
        **figures(requests, times, seconds),
        "tokens_a_step": counted["generation_tokens"] / steps,
        "facts": engine.facts(),
    }


def serve(served: LLMEngine, requests: Sequence[Request], alone: bool) -> tuple[Times, int, float]:
    """Seconds from the start at which each token was generated; steps; total seconds. alone: a request is sent when the
    previous one has finished, and its seconds count from then."""
    coming = deque(requests)
    times: Times = {request.name: [] for request in requests}
    steps, begin, came = 0, time.perf_counter(), 0.0
    while coming or served.has_unfinished_requests():
        while coming and coming[0].arrival <= time.perf_counter() - begin:
            if alone and served.has_unfinished_requests():
                break
            came = time.perf_counter() - begin if alone else 0.0
            request = coming.popleft()
            served.add_request(request.name, {"prompt_token_ids": list(request.prompt)}, engine.greedy(request.output))
        if not served.has_unfinished_requests():
            time.sleep(max(0.0, coming[0].arrival - (time.perf_counter() - begin)))
            continue
        outputs = served.step()
        steps, now = steps + 1, time.perf_counter() - begin
        for output in outputs:
            held = times[output.request_id]
            held.extend([now - came] * (len(output.outputs[0].token_ids) - len(held)))
    return times, steps, time.perf_counter() - begin


def figures(requests: Sequence[Request], times: Times, seconds: float) -> dict[str, Any]:
    """All in seconds. per_token: the mean per request after its first token; gaps: between consecutive tokens."""
    first = [times[request.name][0] - request.arrival for request in requests]
    per_token = [
        (held[-1] - held[0]) / (len(held) - 1) for held in (times[request.name] for request in requests) if held[1:]
    ]
    gaps = [b - a for held in times.values() for a, b in pairwise(held)]
    output = sum(request.output for request in requests)
    prompt = sum(len(request.prompt) for request in requests)
    return {
        "seconds": seconds,
        "output_tokens": output,
        "prompt_tokens": prompt,
        "output_tokens_per_second": output / seconds,
        "tokens_per_second": (output + prompt) / seconds,
        "requests_per_second": len(requests) / seconds,
        "first_token": spread(first),
        "per_token": spread(per_token),
        "gaps": spread(gaps),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, p50, p95 and p99; of a percentile the value nearest to it."""
    ordered = sorted(values)
    at = {f"p{percent}": ordered[round(percent / 100 * (len(ordered) - 1))] for percent in (50, 95, 99)}
    return {"mean": sum(ordered) / len(ordered), **at}


def _warm_up(llm: Any, workload: Workload) -> None:
    """Two requests that share no prefix with the measured ones."""
    prompts = [{"prompt_token_ids": [5 + first] * workload.prompt[0]} for first in range(2)]
    llm.generate(prompts, engine.greedy(8), use_tqdm=False)
