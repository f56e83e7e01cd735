"""The script that measures real models, over the bundled one."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import turboattention
from turboattention.kernels.cpu import available

BUNDLED = Path(turboattention.__file__).parent / "bundled"

pytestmark = pytest.mark.skipif(not available(), reason="the CPU kernels are not built")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("real_models")


@pytest.fixture
def options() -> argparse.Namespace:
    text = BUNDLED / "text.txt"
    return argparse.Namespace(
        models=[f"bundled={BUNDLED / 'model'}"], text=text, context=300, steps=3, rounds=2, dtype="float32"
    )


def test_a_row(script: ModuleType, options: argparse.Namespace) -> None:
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    row = script.measure(options)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert "turbo" not in ALL_ATTENTION_FUNCTIONS
    own, four, three = row["caches"]
    assert (row["context"], own["cache"], own["kl"], own["token_ratio"]["median"]) == (300, "own cache", 0.0, 1.0)
    assert own["cache_bytes"] > 2 * four["cache_bytes"] > 2 * three["cache_bytes"]
    assert 0 < four["kl"] < three["kl"] < 0.1
    for cache in row["caches"]:
        assert (cache["prompt_seconds"]["count"], cache["token_seconds"]["count"]) == (2, 3)
        assert 0 < cache["attention_share"] < 1


def test_predictions_that_are_far_off_are_refused(
    script: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BOUND", 0.0)
    with pytest.raises(RuntimeError, match=r"expected predictions within 0\.0 nats"):
        script.measure(options)


def test_a_text_that_is_too_short(script: ModuleType, options: argparse.Namespace, tmp_path: Path) -> None:
    options.text = tmp_path / "short.txt"
    options.text.write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(SystemExit, match="--text: expected at least 303 tokens"):
        script.measure(options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory(script: ModuleType, options: argparse.Namespace) -> None:
    """In a separate process: reused memory that was freed before would not be measured."""
    call = [sys.executable, script.__file__, "--models", *options.models, "--text", options.text, "--context", 300]
    call += ["--steps", 3, "--peak", script.OWN]
    ran = subprocess.run([str(part) for part in call], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["peak_bytes"] > 2**20
