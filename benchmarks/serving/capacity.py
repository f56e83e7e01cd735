"""Tokens of cache per GiB in vLLM: `python benchmarks/serving/capacity.py`, with the Python that has vLLM.

Starts an engine for each width and model, all with the same `kv_cache_memory_bytes`, and reads how many blocks it has.
Writes benchmarks/results/serving-capacity.json (with --gpu serving-capacity-gpu.json); `page.py --table` then writes
docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import contenders
import models
import processes
from sections import FLOORS

from turboattention.files import write_text

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="memory for pages")
    parser.add_argument("--sequences", type=int, default=64, help="max_num_seqs, the number of tail slots")
    parser.add_argument("--gpu", action="store_true", help="engines on a GPU")
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    options = parser.parse_args()
    out = options.out or processes.RESULTS / f"serving-capacity{'-gpu' * options.gpu}.json"
    document: dict[str, Any] = {"budget": int(options.gib * GIB), "sequences": options.sequences, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        served = (models.bundled_model(), models.llama(Path(folder, "llama"), attention_only=True))
        for model in served:
            calibration = model.mixed(Path(folder, f"mixed-{model.kv_heads}"))
            for contender in contenders.ALL:
                found = _measure(model, contender, calibration, document, options.gpu)
                document["facts"] = found.pop("facts")
                document["rows"].append(_row(model, contender, found, document["budget"], document["rows"]))
                print(_line(document["rows"][-1]), flush=True)
    write_text(out, json.dumps(document, indent=1) + "\n")
    return int(not all(reached(row) for row in document["rows"]))


def reached(row: dict[str, Any]) -> bool:
    """Whether a row is at its floor; most have none."""
    return row["times"] >= FLOORS.get(row["contender"], 0)


def _measure(
    model: models.Model, contender: contenders.Contender, calibration: Path, document: dict[str, Any], gpu: bool
) -> dict[str, Any]:
    options = {
        **model.options(),
        **contender.options(gpu),
        "dtype": "bfloat16",  # that of the stock backend's pages
        "kv_cache_memory_bytes": document["budget"],
        "max_num_seqs": document["sequences"],
        "max_model_len": 4096,
    }
    log = f"capacity-{model.head_dim}-{contender.name}"
    return processes.call("capacity_run", {"options": options}, contender.environment(calibration), log)


def _row(
    model: models.Model,
    contender: contenders.Contender,
    found: dict[str, Any],
    budget: int,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """tokens_per_gib: per GiB of pages. with_side_pool: per GiB of pages and tail slots. times: relative to 16-bit
    pages."""
    alone = found["tokens"] / budget * GIB
    both = found["tokens"] / (budget + found["side_pool_bytes"]) * GIB
    stock = next((row for row in rows if row["model"] == model.title and row["contender"] == "stock"), None)
    base = stock["tokens_per_gib"] if stock else alone
    return {
        "model": model.title,
        "head_dim": model.head_dim,
        "contender": contender.name,
        "title": contender.title,
        **found,
        "tokens_per_gib": round(alone),
        "with_side_pool": round(both),
        "times": round(alone / base, 4),
        "times_with_side_pool": round(both / base, 4),
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:36} {row['title']:36} {row['blocks']:6,} blocks of {row['block_size']}: "
        f"{row['tokens_per_gib']:9,} tokens/GiB, {row['times']:.2f}x ({row['times_with_side_pool']:.2f}x with the "
        f"side pool of {row['side_pool_bytes'] / 2**20:.1f} MiB)"
    )


if __name__ == "__main__":
    sys.exit(main())
