"""A vLLM engine in this process, and what can be read from it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter


def start(options: dict[str, Any]) -> LLM:
    """An engine that counts, without compiling unless told."""
    defaults = {"enforce_eager": True, "seed": 0, "disable_log_stats": False}
    return LLM(**(defaults | options))


def greedy(tokens: int, **more: Any) -> SamplingParams:
    """Exactly `tokens` tokens, as ids."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)


def cache_facts(llm: LLM) -> dict[str, int]:
    """Blocks and tokens of the scheduler, bytes of the layers' tensors, and bytes of the tail slots."""
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    pools = [layer.impl.tail_blocks.nbytes for layer in layers if hasattr(layer.impl, "tail_blocks")]
    blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
    assert blocks is not None
    return {
        "blocks": blocks,
        "block_size": size,
        "tokens": blocks * size,
        "page_bytes": sum(_nbytes(layer.kv_cache) for layer in layers),
        "side_pool_bytes": sum(pools),
    }


def counters(llm: LLM) -> dict[str, int]:
    """vLLM's counters since its start."""
    names = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "generation_tokens")
    found = _counted(llm)
    return {name: int(found[f"vllm:{name}"]) for name in names}


def drafts(llm: LLM) -> dict[str, int]:
    """draft_tokens and accepted_tokens, since it started; none without speculative decoding."""
    found = _counted(llm)
    names = ("draft_tokens", "accepted_tokens")
    return {name: int(found.get(f"vllm:spec_decode_num_{name}", 0)) for name in names}


def resident_bytes() -> int:
    """Memory of this process, including the engine."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def facts() -> dict[str, Any]:
    """The machine and the versions."""
    from turboattention.cli.bench_facts import bench_facts

    found = bench_facts("cpu" if not torch.cuda.is_available() else "triton", vllm=vllm.__version__)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    kept = ("turboattention", "commit", "cpu", "isa", "threads", "torch", "vllm", "time")
    return {name: found[name] for name in kept} | {"gpu": gpu, "python": platform.python_version()}


def _counted(llm: LLM) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}


def _nbytes(cache: Any) -> int:
    parts = cache if isinstance(cache, (list, tuple)) else [cache]
    return sum(part.nbytes for part in parts)
