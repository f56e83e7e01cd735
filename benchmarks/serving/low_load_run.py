"""Time per token of one sequence, with vLLM's own attention and with TurboAttention: two engines in this process, whose
steps alternate, so that whatever else the machine does concerns both."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import contenders
import engine

from turboattention.integrations.vllm import register


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """contexts: for each length of a prompt, `_context`."""
    engines = _both(spec["options"], spec["bits"])
    rows = [_context(engines, length, spec["steps"]) for length in spec["contexts"]]
    return {"contexts": rows, "facts": engine.facts()}


def _both(options: dict[str, Any], bits: str) -> dict[str, Any]:
    from vllm.v1.attention import selector

    os.environ[contenders.VARIABLE] = ""
    stock = engine.start(options)
    os.environ[contenders.VARIABLE] = bits
    register()
    selector._cached_get_attn_backend.cache_clear()
    return {"stock": stock, "turbo": engine.start(options)}


def _context(engines: dict[str, Any], length: int, steps: int) -> dict[str, Any]:
    """Seconds per step: step, medians; and in another run, means, what of it are calls of `_PARTS`."""
    step = _alternate(engines, length, steps)
    medians = {name: statistics.median(x) for name, x in step.items()}
    with _timed() as spent:
        _alternate(engines, length, steps, spent)
    return {
        "context": length,
        "step": medians,
        "parts": {part: total / steps for part, total in spent.items()},
        "ratio": medians["turbo"] / medians["stock"],
        "ratio_of_minima": min(step["turbo"]) / min(step["stock"]),
    }


def _alternate(
    engines: dict[str, Any], length: int, steps: int, spent: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each of `steps` steps of one token, which the engines take in turns. spent: cleared of all others."""
    draw = random.Random(length)
    prompt = [draw.randrange(10, 1000) for _ in range(length)]
    for llm in engines.values():
        llm.llm_engine.add_request("request", {"prompt_token_ids": prompt}, engine.greedy(steps + 2))
        while not any(output.outputs[0].token_ids for output in llm.llm_engine.step()):
            pass
    spent = {} if spent is None else spent
    spent.update(dict.fromkeys(spent, 0.0))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(steps):
        for name, llm in engines.items():
            begin = time.perf_counter()
            llm.llm_engine.step()
            seconds[name].append(time.perf_counter() - begin)
    kept = dict(spent)
    for llm in engines.values():
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    spent.update(kept)
    return seconds


def _parts() -> dict[str, list[tuple[type, str]]]:
    """Methods by what they do."""
    from vllm.v1.attention.backends import cpu_attn

    from turboattention.integrations.vllm.implementation import TurboImpl
    from turboattention.integrations.vllm.metadata import TurboMetadataBuilder

    stock = cpu_attn.CPUAttentionBackendImpl
    return {
        "stock attention": [(stock, "forward"), (stock, "do_kv_cache_update")],
        "stock metadata": [(cpu_attn.CPUAttentionMetadataBuilder, "build")],
        "turbo attention": [(TurboImpl, "forward")],
        "turbo metadata": [(TurboMetadataBuilder, "build")],
    }


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each part, in both engines."""
    spent = dict.fromkeys(_parts(), 0.0)
    with ExitStack() as stack:
        for part, methods in _parts().items():
            for owner, name in methods:
                plain = getattr(owner, name)
                setattr(owner, name, _counted(plain, spent, part))
                stack.callback(setattr, owner, name, plain)
        yield spent


def _counted(plain: Any, spent: dict[str, float], part: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - begin

    return counted
