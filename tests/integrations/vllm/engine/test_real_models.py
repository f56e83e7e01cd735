"""Models that people serve, behind vLLM's API server with the quantized cache and with vLLM's own: `make vllm-models
MODELS='smollm2=FOLDER qwen=FOLDER gemma3=FOLDER'`. `benchmarks/serving/served_models.py` asks, and has the floors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "TURBOATTENTION_MODELS"
SERVING = Path(__file__).parents[4] / "benchmarks" / "serving"


def folder_of(label: str) -> Path:
    """Skips where there is no such model."""
    given = dict(pair.split("=", 1) for pair in os.environ.get(VARIABLE, "").split())
    wanted = f"make vllm-models MODELS='{label}=FOLDER', with a model in Hugging Face's format"
    if label not in given:
        pytest.skip(f"{label}: no folder was given ({wanted})")
    if not Path(given[label], "config.json").exists():
        pytest.skip(f"{label}: no model in {given[label]} ({wanted})")
    return Path(given[label])


@pytest.fixture(scope="module")
def served_models() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        yield importlib.import_module("served_models")


@pytest.mark.parametrize("label", ["smollm2", "qwen", "gemma3"])
def test_beside_the_stock_backend(served_models: Any, label: str) -> None:
    folder, contenders = folder_of(label), served_models.contenders
    checked = contenders.BY_NAME[served_models.SERVED[label].checked]
    found = served_models.compare(label, folder, [contenders.FP8, checked])
    sys.stdout.write("\n".join(["", *served_models.told(found), ""]))
    assert not served_models.problems(found)
    assert all(len(row["completion"]) > 40 for row in found["rows"])
