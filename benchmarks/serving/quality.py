"""The effect of a served cache on a real model's next token, compared with vLLM's 16-bit cache: `python
benchmarks/serving/quality.py smollm2=FOLDER`, with the Python that has vLLM.

Passages are read as prompts, in steps of a few tokens, so that nearly all keys come from the cache. Writes
benchmarks/results/serving-quality-LABEL.json, which the tables of throughput include (`page.py --table`).
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
import numpy as np
import processes
import torch
from contenders import Contender

from turboattention.evaluation.text_metrics import compare
from turboattention.files import write_text

CONTEXT, PASSAGES, STEP = 2048, 2, 64
"""Tokens of a passage, passages of the bundled document, and tokens that the engine reads in a step."""
CONTENDERS = (contenders.FP8, contenders.BY_NAME["turbo-4"], *contenders.CALIBRATED)
_ROWS = 64  # compared at a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="LABEL=FOLDER", help=f"a real model: {', '.join(models.TITLES)}")
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    options = parser.parse_args()
    label, _, folder = options.model.partition("=")
    if label not in models.TITLES:
        parser.error(f"model: expected one of {', '.join(models.TITLES)}, got {label!r}")
    out = options.out or processes.RESULTS / f"serving-quality-{label}.json"
    write_text(out, json.dumps(measure(models.real_model(label, Path(folder)), label), indent=1) + "\n")
    return 0


def measure(model: models.Model, label: str) -> dict[str, Any]:
    """By contender: kl (nats) and top1 against vLLM's 16-bit cache, and the relative change of perplexity; means over
    all tokens. bfloat16, as in the measurements of throughput."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        own_file, file = Path(folder, "own.npy"), Path(folder, "got.npy")
        own = _read(model, label, contenders.STOCK, own_file)
        for contender in CONTENDERS:
            got = _read(model, label, contender, file)
            if got["passages"] != own["passages"]:
                raise RuntimeError(f"{contender.name}: other passages than {contenders.STOCK.name}")
            found = figures[contender.name] = _figures(own_file, file, own["passages"])
            told = f"KL {found['kl']:.4f}, top-1 {found['top1']:.1%}, perplexity {found['perplexity']:+.1%}"
            print(f"{contender.title:36} {told}", flush=True)
    settings = {"context": CONTEXT, "passages": len(own["passages"]), "step": STEP}
    return {"model": model.title, "facts": own["facts"], **settings, "contenders": figures}


def _read(model: models.Model, label: str, contender: Contender, file: Path) -> dict[str, Any]:
    """`quality_run`, which writes `file`."""
    options = {
        **model.options(),
        **contender.options(),
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 2**28,
        "max_num_seqs": 1,
        "max_num_batched_tokens": STEP,
        "max_model_len": CONTEXT + STEP,
        "enable_prefix_caching": False,
        "block_size": 64,
    }
    spec = {"options": options, "context": CONTEXT, "passages": PASSAGES, "file": str(file)}
    calibration = models.calibration(model, label) if contender.needs_calibration else None
    return processes.call("quality_run", spec, contender.environment(calibration), f"quality-{label}-{contender.name}")


def _figures(own_file: Path, got_file: Path, passages: list[list[int]]) -> dict[str, float]:
    own, got = (np.load(file, mmap_mode="r") for file in (own_file, got_file))
    pieces = []
    for number, ids in enumerate(passages):
        for at in range(0, len(ids) - 1, _ROWS):
            expected, mine = (torch.tensor(x[number, at : at + _ROWS]) for x in (own, got))
            pieces.append(compare(expected, mine, torch.tensor(ids[at + 1 : at + 1 + _ROWS])))
    mean = {name: float(np.concatenate([piece[name] for piece in pieces]).mean()) for name in pieces[0]}
    return {
        "kl": mean["kl"],
        "top1": mean["same"],
        "perplexity": float(np.expm1(mean["nll"] - mean["own_nll"])),
        "tokens": sum(len(ids) - 1 for ids in passages),
    }


if __name__ == "__main__":
    sys.exit(main())
