"""Tokens per second of a whole model over a long context, TurboCache in comparison with transformers' own cache.

`python benchmarks/end_to_end.py --out benchmarks/results/cpu/PROCESSOR/end-to-end.json`

The model has the shape of Llama 3.2 1B and random weights, which take the same time as trained ones. Both caches are
filled with the same random keys and values, in their stored form, instead of by a prompt. Steps alternate between SDPA
over a DynamicCache and TurboAttention over a TurboCache, on the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from turboattention import TurboConfig, explain
from turboattention.benchmarking.statistics import paired_ratio, spread
from turboattention.cli.bench_facts import bench_facts
from turboattention.cli.settings import bits_label, parse_bits
from turboattention.files import write_text
from turboattention.integrations.transformers import TurboCache, disable, enable
from turboattention.kv.cache import KVCache

CHUNK = 1024
WARM_UP = 2
BOUND = 0.3
"""Bound of the relative error of the logits between the two caches, which hold the same stored keys and values: the
error of INT8 queries and weights, over all layers."""

LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
}
TINY = LLAMA_3_2_1B | {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 512}


@dataclass(frozen=True)
class Plan:
    """`bits`: as the command line takes them."""

    contexts: list[int]
    bits: list[str]
    steps: int
    dtype: torch.dtype
    backend: str


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = quicker_dtype() if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    plan = Plan(arguments.contexts, arguments.bits, arguments.steps, dtype, arguments.backend)
    shape = TINY if arguments.tiny else LLAMA_3_2_1B
    model = build(shape, dtype, max(plan.contexts) + plan.steps + 8)
    enable()
    try:
        rows = list(measure(model, plan))
    finally:
        disable()
    probe = torch.empty(1, 1, 1, 64, dtype=dtype)
    backend = explain(probe, probe, probe, backend=plan.backend).backend
    facts = bench_facts(backend, model=shape, dtype=str(dtype).removeprefix("torch."), steps=plan.steps)
    document = {"schema": 1, "facts": facts, "end_to_end": rows}
    if arguments.out:
        write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    else:
        print(json.dumps(document, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=lambda x: [int(n) for n in x.split(",")], default=[4096, 16384, 32768])
    parser.add_argument("--bits", type=lambda x: x.split("+"), default=["4", "3"], help="such as 4+3+mixed")
    parser.add_argument("--steps", type=int, default=64, help="pairs of decode steps; 64 pass one compression")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to see that it runs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def quicker_dtype() -> torch.dtype:
    """In which dtype this processor multiplies a decode step's vector by a weight matrix faster."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.randn(8192, 2048).to(dtype), torch.randn(1, 2048).to(dtype)
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - begun)
        seconds[dtype] = min(times[3:])
    return min(seconds, key=lambda dtype: seconds[dtype])


def build(shape: dict[str, int], dtype: torch.dtype, positions: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        **shape, tie_word_embeddings=True, max_position_embeddings=positions, attn_implementation="sdpa", dtype=dtype
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def measure(model: LlamaForCausalLM, plan: Plan) -> Iterator[dict[str, Any]]:
    for context in plan.contexts:
        for bits in plan.bits:
            widths = parse_bits(bits)
            yield beside(model, plan, context, bits_label(widths), TurboConfig(bits=widths))


def beside(model: LlamaForCausalLM, plan: Plan, context: int, label: str, config: TurboConfig) -> dict[str, Any]:
    """One context and one width: alternating steps; their times, and the sizes of the caches."""
    own, turbo = filled(model, plan, context, config)
    runs: list[tuple[str, Cache, list[float]]] = [("sdpa", own, []), ("turbo", turbo, [])]
    first: list[torch.Tensor] = []
    for step in range(plan.steps + WARM_UP):
        for implementation, cache, seconds in runs:
            model.set_attn_implementation(implementation)
            token = torch.tensor([[step % model.config.vocab_size]])
            begun = time.perf_counter()
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            taken = time.perf_counter() - begun
            if step >= WARM_UP:
                seconds.append(taken)
            elif step == 0:
                first.append(logits.double())
    error = float((first[1] - first[0]).norm() / first[0].norm())
    if not error <= BOUND:
        raise RuntimeError(
            f"{label}: expected logits within {BOUND} of those over the model's own cache, got {error:.3g}"
        )
    times = {name: seconds for name, _, seconds in runs}
    own_bytes = sum(x.nbytes for layer in own.layers for x in (layer.keys, layer.values))
    return {
        "context": context,
        "bits": label,
        "logit_error": error,
        "ratio": asdict(paired_ratio(times["sdpa"], times["turbo"])),
        "sdpa_tokens_per_second": 1 / spread(times["sdpa"]).median,
        "turbo_tokens_per_second": 1 / spread(times["turbo"]).median,
        "sdpa_seconds": asdict(spread(times["sdpa"])),
        "turbo_seconds": asdict(spread(times["turbo"])),
        "dynamic_cache_bytes": own_bytes,
        "turbo_cache_bytes": turbo.nbytes,
        "fp16_bytes": turbo.fp16_nbytes,
    }


def filled(model: LlamaForCausalLM, plan: Plan, context: int, config: TurboConfig) -> tuple[DynamicCache, TurboCache]:
    """Both caches with the same random keys and values, as the quantized one stores them, in every layer."""
    shape = model.config
    own = DynamicCache(config=shape)
    turbo = TurboCache(shape, config=config, max_tokens=context + plan.steps + WARM_UP, backend=plan.backend)
    heads, head_dim = shape.num_key_value_heads, shape.head_dim
    for index, layer in enumerate(turbo.layers):
        kv = KVCache(1, heads, head_dim, config=config, max_tokens=context + plan.steps + WARM_UP, dtype=plan.dtype)
        k, v = (torch.randn(1, heads, context, head_dim, dtype=plan.dtype) for _ in range(2))
        for at in range(0, context, CHUNK):
            kv.append(k[:, :, at : at + CHUNK], v[:, :, at : at + CHUNK])
        own.update(*(x.to(plan.dtype) for x in kv.dequantize()), index)
        layer.restore(kv, None, context, None)
    return own, turbo


if __name__ == "__main__":
    main()
