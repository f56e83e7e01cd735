"""Throughput and latency in vLLM under a fixed cache budget: `python benchmarks/serving/throughput.py [--gpu]`, with
the Python that has vLLM; of real models with `--model smollm2=FOLDER` or `--model qwen=FOLDER`.

The same requests run with vLLM's own attention and with TurboAttention, alternating, each in an engine in a separate
process. A budget is the total memory of the cache, including TurboAttention's tail slots. Budgets are small enough that
vLLM's own caches have to preempt. Writes benchmarks/results/serving-throughput.json (with --gpu
serving-throughput-gpu.json, with --model serving-throughput-LABEL.json) as each run ends; `page.py --table` then
writes docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import models
import processes
from throughput_section import load_of, table
from workload import Workload

from turboattention.files import write_text

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """budgets: MiB. rates: requests per second at the middle budget, in addition to all at once. sequences: the largest
    number that run concurrently, more than the 16-bit cache can hold. alone: the number of requests sent one at a time,
    at the same budget."""

    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    sequences: int
    model_length: int
    eager: bool
    alone: int = 0
    contenders: str = "stock,stock-fp8,turbo-4,turbo-3"


class Scenario(NamedTuple):
    """budget: MiB. rate and alone as in `Workload`."""

    budget: int
    rate: float | None
    alone: bool


CPU = Plan((24, 48, 96), (2.0,), 32, (1024, 3072), (128, 256), 32, 4096, eager=True)
GPU = Plan((2048, 4096, 8192), (4.0,), 256, (1024, 3072), (128, 256), 128, 8192, eager=False)
_REAL = replace(
    CPU,
    rates=(),
    alone=6,
    contenders="stock,stock-fp8,turbo-4,turbo-4-calibrated,turbo-3-calibrated,turbo-2-calibrated",
)
REAL = {"smollm2": replace(_REAL, budgets=(256,)), "qwen": replace(_REAL, budgets=(128,))}
"""By label: room for 11 thousand tokens in a 16-bit cache; the requests have 70 thousand."""


def main() -> int:
    options = _options()
    plan = REAL[options.label] if options.label else GPU if options.gpu else CPU
    given = {name: getattr(options, name) for name in ("requests", "budgets", "rates", "alone", "contenders")}
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    competing = [contenders.BY_NAME[name] for name in plan.contenders.split(",")]
    name = "-".join(["serving-throughput", *filter(None, [options.label or ("gpu" if options.gpu else None)])])
    out: Path = options.out or processes.RESULTS / f"{name}.json"
    document: dict[str, Any] = {"plan": asdict(plan), "rounds": options.rounds, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        model = _model(options, Path(folder))
        document["model"] = model.title
        for number in range(options.rounds):
            for scenario in _scenarios(plan):
                for contender in competing:
                    found = _measure(model, contender, plan, scenario, options)
                    document["facts"] = found.pop("facts")
                    shown = {"contender": contender.name, "title": contender.title, **scenario._asdict()}
                    document["rows"].append(shown | {"budget": scenario.budget * MIB, "round": number, **found})
                    print(_line(document["rows"][-1]), flush=True)
                    write_text(out, json.dumps(document, indent=1) + "\n")
    print(table(document))
    return 0


def _options() -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: tuple(kind(part) for part in text.split(",") if part)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", action="store_true", help="Llama 3 8B's shapes with random weights, on a GPU")
    which.add_argument("--model", default="", metavar="LABEL=FOLDER", help=f"a real model: {' or '.join(REAL)}")
    parser.add_argument("--rounds", type=int, default=2, help="times that the contenders take turns (default 2)")
    parser.add_argument("--requests", type=int, help="of each load (default 32; 256 with --gpu)")
    parser.add_argument("--budgets", type=numbers(int), help="MiB, as in 24,48")
    parser.add_argument("--rates", type=numbers(float), help="requests per second, as in 0.5,1; empty for none")
    parser.add_argument("--alone", type=int, help="number of requests sent one at a time; 0 for none")
    parser.add_argument("--contenders", help=f"who, as in {CPU.contenders}")
    parser.add_argument("--compile", action="store_true", help="compile the model, as a server does (minutes)")
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    options = parser.parse_args()
    options.label, _, folder = options.model.partition("=")
    options.folder = Path(folder)
    if options.label and (options.label not in REAL or not (options.folder / "config.json").exists()):
        parser.error(f"--model: expected {' or '.join(REAL)} and a folder, as smollm2=FOLDER, got {options.model!r}")
    if not options.label and "calibrated" in (options.contenders or ""):
        parser.error("--contenders: expected calibrated ones with --model alone")
    unknown = set((options.contenders or "stock").split(",")) - set(contenders.BY_NAME)
    if unknown:
        parser.error(f"--contenders: expected some of {', '.join(contenders.BY_NAME)}, got {', '.join(unknown)}")
    return options


def _model(options: argparse.Namespace, folder: Path) -> models.Model:
    if options.label:
        return models.real_model(options.label, options.folder)
    return models.llama(folder, attention_only=False) if options.gpu else models.bundled_model()


def _scenarios(plan: Plan) -> list[Scenario]:
    """Budgets with all requests at once, and one of them with staggered arrivals, or one request at a time."""
    middle = plan.budgets[len(plan.budgets) // 2]
    found = [Scenario(budget, None, False) for budget in plan.budgets]
    found += [Scenario(middle, rate, False) for rate in plan.rates]
    return [*found, *([Scenario(middle, None, True)] if plan.alone else [])]


def _measure(
    model: models.Model, contender: contenders.Contender, plan: Plan, scenario: Scenario, options: argparse.Namespace
) -> dict[str, Any]:
    pool = model.side_pool(plan.sequences) if contender.bits else 0
    engine = {
        **model.options(),
        **contender.options(options.gpu),
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": scenario.budget * MIB - pool,
        "max_num_seqs": plan.sequences,
        "max_model_len": plan.model_length,
        "enforce_eager": plan.eager and not options.compile,
    }
    requests = plan.alone if scenario.alone else plan.requests
    vocabulary = None if options.label else model.vocabulary
    load = Workload(requests, plan.prompt, plan.output, scenario.rate, vocabulary, scenario.alone)
    log = f"throughput-{contender.name}-{scenario.budget}-{'alone' if scenario.alone else scenario.rate or 'burst'}"
    calibration = models.calibration(model, options.label) if contender.calibrated else None
    with tempfile.TemporaryDirectory() as folder:
        given = contender.environment(calibration or model.mixed(Path(folder, "mixed")))
        found = processes.call("throughput_run", {"options": engine, "workload": asdict(load)}, given, log)
    if found["side_pool_bytes"] != pool:
        raise RuntimeError(f"side pool: expected {pool} bytes, the engine has {found['side_pool_bytes']}")
    return found


def _line(row: dict[str, Any]) -> str:
    return (
        f"round {row['round'] + 1}, {row['budget'] // MIB:,} MiB, {load_of(row)}: {row['title']:26} "
        f"{row['tokens']:7,} tokens of cache, {row['output_tokens_per_second']:7.1f} tokens/s, "
        f"{row['tokens_a_step']:5.1f} at once, first token {row['first_token']['p50']:6.2f} s, then "
        f"{row['per_token']['mean'] * 1e3:6.1f} ms (p99 {row['per_token']['p99'] * 1e3:.1f}), "
        f"{row['num_preemptions']} preemptions"
    )


if __name__ == "__main__":
    sys.exit(main())
