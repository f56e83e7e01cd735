"""The page about accuracy says what the file of results says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.suite import document

ROOT = Path(__file__).parents[2]


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script, as it runs: the modules beside it are top-level."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for one in ("accuracy", "accuracy_tables"):
        monkeypatch.delitem(sys.modules, one, raising=False)
    return importlib.import_module(name)


def metric(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def units(method: str, bits: float, kl: float, change: float, recall: float) -> list[dict[str, Any]]:
    names = {"perplexity": 20.0, "perplexity_change": change, "bits_per_byte": 1.5, "kl": kl, "top1": 0.9}
    metrics = {name: metric(value, 0.0001) for name, value in names.items()}
    common = {"method": method, "title": METHODS[method].title, "bits_per_element": bits}
    solved = [int(index < recall * 200) for index in range(200)]
    by_length = [{"length": 512, "right": 1, "asked": 2, "solved": solved, **metric(recall, 0.1)}]
    return [
        common | {"task": "perplexity", "metrics": metrics},
        common | {"task": "recall", "metrics": {"accuracy": metric(recall, 0.1)}, "by_length": by_length},
    ]


@pytest.fixture
def measured() -> dict[str, Any]:
    every = [("fp16", 16.0, 0.0, 0.0, 1.0), ("turbo-4", 4.5, 0.001, 0.002, 0.995), ("turbo-3", 3.5, 0.003, 0.01, 0.9)]
    every += [("kivi-4", 5.3, 0.0005, 0.0, 1.0), ("int4", 4.6, 0.004, 0.0, 1.0), ("turboquant-3", 3.2, 0.1, 0.0, 1.0)]
    found = [unit for row in every for unit in units(*row)]
    return document({"model": "some"}, [METHODS[row[0]] for row in every], found)


def test_aims(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = module("accuracy_tables", monkeypatch).aims(measured).splitlines()[2:]
    assert [line.split(" | ")[1:] for line in lines] == [
        ["+0.20%<br>[+0.19, +0.21]", "not decided: the interval holds the bound |"],
        ["+0.5 points lost<br>[+0.0, +1.5]", "not decided: the interval holds the bound |"],
        ["+1.00%<br>[+0.99, +1.01]", "missed |"],
        ["+10.0 points lost<br>[+6.0, +14.5]", "missed |"],
    ]


def test_each_baseline_meets_our_best_of_at_most_its_size(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = module("accuracy_tables", monkeypatch).against(measured).splitlines()[2:]
    assert [(line.split(" | ")[0], line.split(" | ")[3], line.split(" | ")[-1]) for line in lines] == [
        ("| TurboQuant-MSE 3", "–", "nothing as small |"),
        ("| INT4 per token", "TurboAttention 4", "lower |"),
        ("| KIVI-4", "TurboAttention 4", "higher |"),
    ]


def test_page_has_every_method(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    page = module("accuracy_tables", monkeypatch).page(measured)
    for method in measured["methods"]:
        assert f"| {method['title']} |" in page
    assert "| recall | 512 |" in page


def test_results_are_rounded_and_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = module("accuracy", monkeypatch).rounded
    assert rounded({"a": [1.23456789, 2], "seconds": 3.0, "b": {"reused": True, "c": None}}) == {
        "a": [1.23457, 2],
        "b": {"c": None},
    }


def test_the_section_is_replaced_and_the_rest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("accuracy", monkeypatch)
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.with_section(text, "new") == text.replace("old", "new")
    assert script.BEGIN in script.PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("accuracy", monkeypatch)
    if not script.RESULTS.exists():
        pytest.skip("nothing has been measured yet")
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.with_section(text, script.page(json.loads(script.RESULTS.read_text(encoding="utf-8")))) == text
