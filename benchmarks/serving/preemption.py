"""Real models in vLLM under caches in which 16 bits and fp8 must preempt: `python benchmarks/serving/preemption.py
smollm2=FOLDER qwen=FOLDER`, with the Python that has vLLM.

How many tokens a cache holds, and how often it preempts, depends on its blocks and on the lengths of requests alone. It
is counted with one layer that has the model's KV heads, and one layer's share of the memory: no time is measured
(`throughput.py --model` measures it, on a quiet machine). The quality of what is served is that of the model itself,
in float32. vLLM's fp8 needs AVX-512 on CPUs: its blocks are counted as 16-bit ones in twice the memory, and keys and
values are rounded to e4m3 as they are stored. --low-load adds the time per token of one sequence as a ratio of two
engines whose steps alternate. Writes benchmarks/results/serving-preemption.json; `page.py --table` then writes
docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import models
import processes
from workload import Workload

from turboattention.files import write_text

COMPARED = (contenders.STOCK, contenders.FP8, contenders.BY_NAME["turbo-4"], contenders.BY_NAME["turbo-3"])
PROMPT, OUTPUT, SEQUENCES, LENGTH = (1024, 3072), (128, 256), 32, 4096


def main() -> int:
    options = _options()
    out: Path = options.out or processes.RESULTS / "serving-preemption.json"
    document: dict[str, Any] = {"requests": options.requests, "prompt": PROMPT, "output": OUTPUT}
    document |= {"sequences": SEQUENCES, "tokens_read": options.tokens, "rows": [], "low_load": []}
    for label, folder in options.models:
        model = models.real_model(label, folder)
        if options.low_load:
            document["low_load"].append(_low_load(model, document))
        loads, quality = _loads(model, options, document), _quality(model, options.tokens)
        document["rows"] += [row | quality[row["contender"]] for row in loads]
        write_text(out, json.dumps(document, indent=1) + "\n")
        for row in document["rows"]:
            print(json.dumps({name: row[name] for name in ("model", "contender", "tokens", "num_preemptions", "kl")}))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=models.labelled, nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--requests", type=int, default=32, help="of each load (default 32)")
    parser.add_argument(
        "--caches", type=int, nargs="+", default=[8192, 16384], help="memory, as tokens of a 16-bit cache"
    )
    parser.add_argument("--tokens", type=int, default=768, help="of the text that is read (default 768)")
    parser.add_argument("--low-load", action="store_true", help="the time per token of one sequence, too")
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    return parser.parse_args()


def _loads(model: models.Model, options: argparse.Namespace, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every contender and cache."""
    load = asdict(Workload(options.requests, PROMPT, OUTPUT, None, 512))
    budgets = [tokens * model.token_bytes for tokens in options.caches]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        layer = models.one_layer(model, Path(folder))
        for contender in COMPARED:
            engines = [_engine(layer, contender, budget // model.layers) for budget in budgets]
            spec = {"loads": [{"options": engine, "workload": load} for engine in engines]}
            log = f"loads-{model.title}-{contender.name}"
            for budget, found in zip(
                budgets, processes.call("loads_run", spec, contender.environment(), log)["loads"], strict=True
            ):
                document["facts"] = found["facts"]
                kept = {name: found[name] for name in ("tokens", "num_preemptions", "tokens_a_step")}
                named = {"model": model.title, "contender": contender.name, "title": contender.title}
                rows.append({**named, "budget": budget, **kept})
    return rows


def _engine(layer: models.Model, contender: contenders.Contender, budget: int) -> dict[str, Any]:
    """What the side pool takes comes out of the budget."""
    pages = budget - (layer.side_pool(SEQUENCES) if contender.bits else 0)
    return {
        **layer.options(),
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 2 * pages if contender.cache_dtype == "fp8" else pages,
        "max_num_seqs": SEQUENCES,
        "max_model_len": LENGTH,
    }


def _quality(model: models.Model, tokens: int) -> dict[str, dict[str, float]]:
    """Figures by contender."""
    engine = {
        **model.options(),
        "dtype": "float32",
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": 2,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": False,
    }
    found: dict[str, dict[str, float]] = {"stock": {"kl": 0.0, "top1": 1.0, "perplexity_change": 0.0}}
    with tempfile.TemporaryDirectory() as folder:
        spec = {"options": engine, "tokens": tokens, "reference": str(Path(folder, "exact.pt"))}
        found["fp8"] = processes.call("quality_run", spec, contenders.STOCK.environment(), "quality-exact")["fp8"]
        for contender in COMPARED:
            if contender.bits:
                given, log = contender.environment(), f"quality-{contender.name}"
                found[contender.name] = processes.call("quality_run", spec, given, log)["own"]
    return found


def _low_load(model: models.Model, document: dict[str, Any]) -> dict[str, Any]:
    """4 bits."""
    engine = {
        **model.options(),
        "dtype": "float32",
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": 4,
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    spec = {"options": engine, "bits": "4", "contexts": [128, 1024, 3072], "steps": 60}
    found = processes.call("low_load_run", spec, {}, f"low-load-{model.title}")
    document["facts"] = found.pop("facts")
    return {"model": model.title, **found}


if __name__ == "__main__":
    sys.exit(main())
