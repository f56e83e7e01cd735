"""Throughput and latency in vLLM under a fixed cache budget: `python benchmarks/serving/throughput.py [--gpu]`, with
the Python that has vLLM.

The same requests to vLLM's own attention and to TurboAttention, each run an engine in a process of its own, in turns.
A budget is all the memory that the cache takes: what TurboAttention keeps beside its pages comes out of it. Budgets
are small enough that the 16-bit cache has to preempt. Writes benchmarks/results/serving-throughput.json (with --gpu
serving-throughput-gpu.json) as each run ends; `page.py --table` then writes docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import contenders
import models
import processes
from workload import Workload

from turboattention.files import write_text

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """budgets: MiB. rates: requests a second at the largest budget but one, beside all at once. sequences: the most
    that run at once, out of reach of the 16-bit cache."""

    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    sequences: int
    model_length: int
    eager: bool


CPU = Plan((24, 48, 96), (2.0,), 32, (1024, 3072), (128, 256), 32, 4096, eager=True)
GPU = Plan((2048, 4096, 8192), (4.0,), 256, (1024, 3072), (128, 256), 128, 8192, eager=False)


def main() -> int:
    options = _options()
    plan = GPU if options.gpu else CPU
    plan = replace(plan, requests=options.requests or plan.requests, budgets=options.budgets or plan.budgets)
    plan = replace(plan, rates=plan.rates if options.rates is None else options.rates)
    name = "serving-throughput-gpu.json" if options.gpu else "serving-throughput.json"
    out: Path = options.out or processes.RESULTS / name
    document: dict[str, Any] = {"plan": asdict(plan), "rounds": options.rounds, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        model = models.llama(Path(folder), attention_only=False) if options.gpu else models.bundled_model()
        document["model"] = model.title
        for number in range(options.rounds):
            for budget, rate in _scenarios(plan):
                for contender in options.contenders:
                    found = _measure(model, contender, plan, budget, rate, options.gpu)
                    document["facts"] = found.pop("facts")
                    shown = {"contender": contender.name, "title": contender.title, "budget": budget * MIB}
                    document["rows"].append(shown | {"rate": rate, "round": number, **found})
                    print(_line(document["rows"][-1]), flush=True)
                    write_text(out, json.dumps(document, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: tuple(kind(part) for part in text.split(",") if part)

    def named(text: str) -> list[contenders.Contender]:
        return [contenders.BY_NAME[name] for name in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="Llama 3 8B's shapes with random weights, on a GPU")
    parser.add_argument("--rounds", type=int, default=2, help="times that the contenders take turns (default 2)")
    parser.add_argument("--requests", type=int, help="of each load (default 32)")
    parser.add_argument("--budgets", type=numbers(int), help="MiB, as in 24,48")
    parser.add_argument("--rates", type=numbers(float), help="requests a second, as in 0.5,1; empty for none")
    parser.add_argument(
        "--contenders", type=named, default=named("stock,turbo-4,turbo-3"), help="who (default stock,turbo-4,turbo-3)"
    )
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    return parser.parse_args()


def _scenarios(plan: Plan) -> list[tuple[int, float | None]]:
    """Budgets with all requests at once, and one of them with requests that come by and by."""
    middle = plan.budgets[len(plan.budgets) // 2]
    return [*((budget, None) for budget in plan.budgets), *((middle, rate) for rate in plan.rates)]


def _measure(
    model: models.Model, contender: contenders.Contender, plan: Plan, budget: int, rate: float | None, gpu: bool
) -> dict[str, Any]:
    pool = model.side_pool(plan.sequences) if contender.bits else 0
    options = {
        **model.options(),
        **contender.options(gpu),
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": budget * MIB - pool,
        "max_num_seqs": plan.sequences,
        "max_model_len": plan.model_length,
        "enforce_eager": plan.eager,
    }
    load = Workload(plan.requests, plan.prompt, plan.output, rate, model.vocabulary)
    log = f"throughput-{contender.name}-{budget}-{rate or 'burst'}"
    with tempfile.TemporaryDirectory() as folder:
        given = contender.environment(model.mixed(Path(folder, "mixed")))
        found = processes.call("throughput_run", {"options": options, "workload": asdict(load)}, given, log)
    if found["side_pool_bytes"] != pool:
        raise RuntimeError(f"side pool: expected {pool} bytes, the engine has {found['side_pool_bytes']}")
    return found


def _line(row: dict[str, Any]) -> str:
    rate = "all at once" if row["rate"] is None else f"{row['rate']:g} a second"
    return (
        f"round {row['round'] + 1}, {row['budget'] // MIB:,} MiB, {rate}: {row['title']:26} "
        f"{row['output_tokens_per_second']:7.1f} tokens/s, {row['tokens_a_step']:5.1f} at once, first token "
        f"{row['first_token']['p50']:6.2f} s, then {row['per_token']['mean'] * 1e3:6.1f} ms "
        f"(p95 {row['per_token']['p95'] * 1e3:.1f}), {row['num_preemptions']} preemptions"
    )


if __name__ == "__main__":
    sys.exit(main())
