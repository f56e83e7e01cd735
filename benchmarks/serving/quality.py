"""What a served cache does to a model's next token, beside the 16-bit cache: read as prompts, in pieces."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import models
import numpy as np
import processes
import torch

from turboattention.evaluation.text_metrics import compare

CONTEXT, PASSAGES, PIECE = 2048, 3, 64
"""Tokens of a passage, passages, and tokens that the engine reads in a step: nearly all keys come from the cache."""
_ROWS = 64  # compared at a time


def measure(model: models.Model, label: str, measured: Sequence[contenders.Contender]) -> dict[str, Any]:
    """By contender: kl (nats) and top1 against vLLM's 16-bit cache, and the relative change of perplexity; means over
    all tokens. bfloat16, as in the measurements of throughput."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        own, passages = _logprobs(model, label, contenders.STOCK, Path(folder, "own.npy"))
        for contender in measured:
            if contender == contenders.STOCK:
                continue
            file = Path(folder, "got.npy")
            got, same = _logprobs(model, label, contender, file)
            if same != passages:
                raise RuntimeError(f"{contender.name}: other passages than {contenders.STOCK.name}")
            found[contender.name] = _figures(own, got, passages)
            file.unlink()
            print(f"quality: {contender.title:26} {_told(found[contender.name])}", flush=True)
    return found


def _logprobs(
    model: models.Model, label: str, contender: contenders.Contender, file: Path
) -> tuple[np.ndarray, list[list[int]]]:
    options = {
        **model.options(),
        **contender.options(),
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 2**28,
        "max_num_seqs": 1,
        "max_num_batched_tokens": PIECE,
        "max_model_len": CONTEXT + PIECE,
        "enable_prefix_caching": False,
        "block_size": 64,
    }
    spec = {"options": options, "context": CONTEXT, "passages": PASSAGES, "file": str(file)}
    calibration = models.calibration(model, label) if contender.needs_calibration else None
    given = contender.environment(calibration)
    found = processes.call("quality_run", spec, given, f"quality-{label}-{contender.name}")
    return np.load(file, mmap_mode="r"), found["passages"]


def _figures(own: np.ndarray, got: np.ndarray, passages: list[list[int]]) -> dict[str, float]:
    pieces = []
    for number, ids in enumerate(passages):
        for at in range(0, len(ids) - 1, _ROWS):
            mine, its = (torch.tensor(x[number, at : at + _ROWS]) for x in (got, own))
            pieces.append(compare(its, mine, torch.tensor(ids[at + 1 : at + 1 + _ROWS])))
    mean = {name: float(np.concatenate([piece[name] for piece in pieces]).mean()) for name in pieces[0]}
    return {
        "kl": mean["kl"],
        "top1": mean["same"],
        "perplexity": float(np.expm1(mean["nll"] - mean["own_nll"])),
        "tokens": sum(len(ids) - 1 for ids in passages),
    }


def _told(figures: dict[str, float]) -> str:
    return f"KL {figures['kl']:.4f}, top-1 {figures['top1']:.1%}, perplexity {figures['perplexity']:+.1%}"
