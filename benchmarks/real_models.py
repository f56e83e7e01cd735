"""Prompt time, tokens per second and memory of real models, over their own cache and over TurboCaches.

`python benchmarks/real_models.py --models smollm2=FOLDER qwen=FOLDER --text FILE \\
    --out benchmarks/results/cpu/PROCESSOR/NAME.json`

Each model and context runs in a separate process. The caches alternate in reading the same text and continuing with the
same tokens, so that disturbances of the machine affect all of them. Peak memory comes from further processes with one
cache each. `--gguf smollm2=FILE --llama PYTHON` adds llama.cpp (llama-cpp-python in that Python's environment) with
f16, q8_0 and q4_0 caches over the model's GGUF file. Its weights are quantized, unlike those here, so that only its
caches can be compared with each other; it is not measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

from turboattention import TurboConfig
from turboattention.benchmarking.statistics import paired_ratio, spread
from turboattention.cli.bench_facts import bench_facts
from turboattention.files import write_text
from turboattention.integrations.transformers import TurboCache, disable, enable

OWN = "own cache"
CONFIGS = {"4 bits": TurboConfig(), "3 bits": TurboConfig(bits=3, reorder_k=True)}
BOUND = 0.5
"""Largest mean KL divergence (nats) from the model's own cache; a larger one cannot be due to quantization."""
LLAMA = Path(__file__).with_name("real_models_llama.py")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.peak:
        print(json.dumps({"peak_bytes": peak_bytes(options)}))
    elif options.context:
        print(json.dumps(measure(options)))
    else:
        rows = list(collect(options))
        document = {"schema": 1, "facts": bench_facts("cpu", dtype=options.dtype), "real_models": rows}
        text = json.dumps(document, indent=1) + "\n"
        write_text(options.out, text) if options.out else print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text that is longer than the contexts")
    parser.add_argument("--contexts", type=lambda x: [int(n) for n in x.split(",")], default=[1024, 4096, 8192])
    parser.add_argument("--steps", type=int, default=64, help="tokens after the prompt; 64 pass one compression")
    parser.add_argument("--rounds", type=int, default=3, help="prompts read with each cache")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gguf", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--context", type=int, help="measure the first model at this context only, and print the row")
    parser.add_argument("--peak", choices=[OWN, *CONFIGS], help="with --context: only the peak memory of one cache")
    return parser.parse_args()


def collect(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    files = dict(one.split("=", 1) for one in options.gguf)
    for model in options.models:
        name, folder = model.split("=", 1)
        longest = AutoTokenizer.from_pretrained(folder).model_max_length
        for context in options.contexts:
            if context > longest:
                continue
            child = [sys.executable, __file__, "--models", model, "--text", options.text, "--steps", options.steps]
            child += ["--rounds", options.rounds, "--dtype", options.dtype, "--threads", options.threads]
            row = _run([*child, "--context", context])
            for cache in row["caches"]:
                cache |= _run([*child, "--context", context, "--peak", cache["cache"]])
            if name in files and options.llama:
                ids = ",".join(map(str, _ids(folder, options.text, context + options.steps)))
                call = [options.llama, LLAMA, files[name], options.threads, context]
                row["llama.cpp"] = _run(call, ids)
            print(f"{name}, {context} tokens: done", file=sys.stderr)
            yield {"model": name} | row


def _run(command: list[Any], stdin: str | None = None) -> Any:
    source = str(Path(__file__).parents[1] / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(
        [str(part) for part in command], input=stdin, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(ran.stdout.splitlines()[-1])


def _ids(folder: str, text: Path, count: int) -> list[int]:
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8")[: count * 12], verbose=False)
    if len(ids["input_ids"]) < count:
        raise SystemExit(f"--text: expected at least {count} tokens, got {len(ids['input_ids'])}")
    return ids["input_ids"][:count]


def _load(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    folder = options.models[0].split("=", 1)[1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    return model, torch.tensor([_ids(folder, options.text, options.context + options.steps)])


def _caches(model: Any) -> dict[str, Callable[[], Any]]:
    """Makes an empty cache, by its name in the table."""
    own: dict[str, Callable[[], Any]] = {OWN: lambda: DynamicCache(config=model.config)}
    return own | {
        name: lambda config=config: TurboCache(model.config, config=config) for name, config in CONFIGS.items()
    }


class _Attention:
    """Seconds spent in attention: in a cache's `update` and in the attention function that follows it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.functions = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "turbo")}

    def __enter__(self) -> _Attention:
        for name, function in self.functions.items():
            ALL_ATTENTION_FUNCTIONS.register(name, self.timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.functions.items():
            ALL_ATTENTION_FUNCTIONS.register(name, function)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begun

        return call


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One model at one context: alternating prompts, then alternating tokens over the last prompts' caches."""
    model, ids = _load(options)
    enable()
    try:
        with torch.no_grad(), _Attention() as attention:
            return _measure(options, model, ids, attention)
    finally:
        disable()


def _measure(options: argparse.Namespace, model: Any, ids: torch.Tensor, attention: _Attention) -> dict[str, Any]:
    makers, context = _caches(model), options.context
    prompts: dict[str, list[float]] = {name: [] for name in makers}
    tokens: dict[str, list[float]] = {name: [] for name in makers}
    attending, divergence = dict.fromkeys(makers, 0.0), dict.fromkeys(makers, 0.0)
    caches: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, make in makers.items():
            caches[name] = make()
            _forward(model, name, ids[:, :context], caches[name], attention, prompts[name])
    for step in range(options.steps):
        token, wanted = ids[:, context + step : context + step + 1], None
        for name, cache in caches.items():
            before = attention.seconds
            said = _forward(model, name, token, cache, attention, tokens[name])
            attending[name] += attention.seconds - before
            wanted = said if wanted is None else wanted
            divergence[name] += float((wanted.exp() * (wanted - said)).sum()) / options.steps
    worst = max(divergence.values())
    if not worst <= BOUND:
        raise RuntimeError(f"expected predictions within {BOUND} nats of those over the own cache, got {worst:.3g}")
    caches_rows = []
    for name, cache in caches.items():
        row = {"cache": name, "kl": divergence[name], "cache_bytes": _bytes(cache)}
        row["attention_share"] = attending[name] / sum(tokens[name])
        for part, times in (("prompt", prompts), ("token", tokens)):
            row[f"{part}_seconds"] = asdict(spread(times[name]))
            row[f"{part}_ratio"] = asdict(paired_ratio(times[OWN], times[name]))
        caches_rows.append(row)
    return {"context": context, "caches": caches_rows}


def _forward(
    model: Any, name: str, ids: torch.Tensor, cache: Any, attention: _Attention, seconds: list[float]
) -> torch.Tensor:
    """Log-probabilities float64 [vocabulary] of the next token; appends the time of the call."""
    model.set_attn_implementation("sdpa" if name == OWN else "turbo")
    update = type(cache).update
    cache.update = attention.timed(lambda *arguments, **options: update(cache, *arguments, **options))
    begun = time.perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    seconds.append(time.perf_counter() - begun)
    del cache.update
    return logits[0, -1].double().log_softmax(-1)


def _bytes(cache: Any) -> int:
    if isinstance(cache, TurboCache):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@torch.no_grad()
def peak_bytes(options: argparse.Namespace) -> int:
    """Peak memory of reading the prompt and continuing it, above that of the loaded model."""
    enable()
    model, ids = _load(options)
    model.set_attn_implementation("sdpa" if options.peak == OWN else "turbo")
    cache = _caches(model)[options.peak]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of loading the model, is forgotten
    before = _status("VmRSS")
    for begin, end in ((0, options.context), *((n, n + 1) for n in range(options.context, ids.shape[1]))):
        model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
