"""The pages on accuracy agree with the files of results."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from turboattention.evaluation.baselines import METHODS, parse_methods
from turboattention.evaluation.questions import is_question_set
from turboattention.evaluation.suite import check_names, document

FACTS = {"weights": "a", "dtype": "float32"}
SETTINGS = {"text": "wiki (9 characters)", "context": 2048, "piece": 64}
ROOT = Path(__file__).parents[2]


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script, as it runs: the modules beside it are top-level."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for one in ("accuracy", "accuracy_plan", "accuracy_tables", "accuracy_claims", "accuracy_questions"):
        monkeypatch.delitem(sys.modules, one, raising=False)
    return importlib.import_module(name)


def metric(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def units(method: str, bits: float, kl: float, change: float, recall: float) -> list[dict[str, Any]]:
    names = {"perplexity": 20.0, "perplexity_change": change, "bits_per_byte": 1.5, "kl": kl, "overlap": 0.95}
    metrics = {name: metric(value, 0.0001) for name, value in (names | {"top1": 0.9}).items()}
    common = {"method": method, "title": METHODS[method].title, "bits_per_element": bits}
    solved = [int(index < recall * 200) for index in range(200)]
    by_length = [{"length": 512, "right": 1, "asked": 2, "solved": solved, **metric(recall, 0.1)}]
    return [
        common | {"task": "perplexity", "metrics": metrics, "tokens": 2047, "settings": SETTINGS},
        common | {"task": "recall", "metrics": {"accuracy": metric(recall, 0.1)}, "by_length": by_length},
    ]


@pytest.fixture
def measured() -> dict[str, Any]:
    every = [("fp16", 16.0, 0.0, 0.0, 1.0), ("turbo-4", 4.5, 0.001, 0.002, 0.995), ("turbo-3", 3.5, 0.003, 0.01, 0.9)]
    every += [("kivi-4", 5.3, 0.0005, 0.0, 1.0), ("int4", 4.6, 0.004, 0.0, 1.0), ("turboquant-3", 3.2, 0.1, 0.0, 1.0)]
    found = [unit for row in every for unit in units(*row)]
    return document({"model": "some"}, [METHODS[row[0]] for row in every], found)


def test_aims(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = module("accuracy_claims", monkeypatch).aims(measured)
    assert [row[1:] for row in rows] == [
        ["+0.20%\n[+0.19, +0.21]", "undecided: the interval contains the bound"],
        ["+0.5 points lost\n[+0.0, +1.5]", "undecided: the interval contains the bound"],
        ["+1.00%\n[+0.99, +1.01]", "missed"],
        ["+10.0 points lost\n[+6.0, +14.5]", "missed"],
    ]


def test_aims_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and size have separate verdicts, and no baseline is omitted."""
    every = [("turbo-4-reordered", 4.2, 0.004, -0.008), ("turbo-3-reordered", 3.64, 0.03, 0.015)]
    every += [("turbo-2-reordered", 2.3, 0.08, 0.0), ("kivi-4", 5.3, 0.0005, 0.0), ("int4", 4.6, 0.1, 0.0)]
    found = [units(*row, 1.0)[0] for row in [*every, ("kivi-2", 2.2, 0.5, 0.0)]]
    stage = document({"model": "some"}, [METHODS[unit["method"]] for unit in found], found)
    _, rows = module("accuracy_claims", monkeypatch).real_aims("qwen", stage)
    assert [row[2:] for row in rows] == [
        ["reached", "4.20", "reached"],
        ["missed", "3.64", "missed by 0.34"],
        ["undecided: the interval contains the bound", "2.30", "reached"],
        ["reached", "4.20", "–"],
        ["undecided: the interval contains the bound", "3.64", "–"],
        ["missed", "–", "–"],
    ]
    assert rows[0][0] == "TurboAttention 4, reordered: KL of at most 0.008 at 4.3 bits"
    assert rows[-1][1] == "lower than 1 of 3\nKIVI-2: no configuration this small\nKIVI-4: higher"


def test_each_baseline_meets_our_best_of_at_most_its_size(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = module("accuracy_claims", monkeypatch).against(measured)
    assert [(row[0], row[3], row[-1]) for row in rows] == [
        ("TurboQuant-MSE 3", "–", "no configuration this small"),
        ("INT4 per token", "TurboAttention 4", "lower"),
        ("KIVI-4", "TurboAttention 4", "higher"),
    ]


@pytest.fixture
def documents(measured: dict[str, Any]) -> dict[str, Any]:
    """A model of stages and the bundled one."""
    texts, recalls = ([u for u in measured["units"] if u["task"] == task] for task in ("perplexity", "recall"))
    grown = [u | {"metrics": u["metrics"] | {"kl_first": metric(0.01, 0), "kl_last": metric(0.03, 0)}} for u in texts]
    asked = [
        {"method": name, "title": METHODS[name].title, "task": "gsm8k", "bits_per_element": 5.0, "solved": solved}
        for name, solved in (("fp16", [1, 1, 1, 0]), ("turbo-4", [1, 0, 0, 0]), ("kivi-4", [1, 1]))
    ]
    stages = {"wikitext2-2048": texts, "growth": grown, "recall": recalls, "gsm8k": asked}
    return {"qwen": {"facts": {"model": "Qwen"}, "stages": stages}, "bundled": measured}


def test_page_has_every_method_of_every_model(documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    qwen, bundled = module("accuracy_tables", monkeypatch).page(documents).split("## The bundled model")
    for title in (method["title"] for method in documents["bundled"]["methods"]):
        assert qwen.count(f"| {title} |") >= 2
        assert f"| {title} |" in bundled
    assert "2,047 tokens of wiki (9 characters), passages of 2,048, pieces of 64." in qwen
    assert "| 0.01000 | 0.03000 | 3.0x |" in qwen
    assert "| recall | 512 |" in qwen
    assert "| recall | 512 |" in bundled


def test_questions_are_compared_in_pairs(documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"units": documents["qwen"]["stages"]["gsm8k"]}
    stage["methods"] = module("accuracy_tables", monkeypatch).methods(stage["units"])
    ((columns, rows),) = module("accuracy_questions", monkeypatch).questions(stage)
    assert columns == ["method", "bits / element", "correct, of 4", "against FP16 (own cache)"]
    # KIVI-4 has answered two of the four: no row.
    assert [[row[0], row[2].split("\n")[0], row[3]] for row in rows] == [
        ["FP16 (own cache)", "75.0%", "–"],
        ["TurboAttention 4", "25.0%", "+0 −2, p = 0.50"],
    ]


def test_readme_has_the_real_models_first_text(documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module("accuracy_tables", monkeypatch)
    lines = tables.readme(documents).splitlines()
    assert lines[0] == "| method | Qwen2.5-Coder-0.5B-Instruct:<br>bits, KL, perplexity |"
    assert "| TurboAttention 4 | 4.50, 0.0010, +0.2% |" in lines
    assert not any("TurboQuant-MSE 3" in line for line in lines)


def test_collects_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("accuracy", monkeypatch)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.collect("qwen", tmp_path) is None
    for stage, method in (("book-2048", "kivi-4"), ("book-2048", "fp16"), ("gsm8k", "fp16"), ("gsm8k-more", "turbo-4")):
        task = "gsm8k" if "gsm8k" in stage else "perplexity"
        unit = {
            "method": method,
            "title": METHODS[method].title,
            "task": task,
            "metrics": {"kl": 1 / 3},
            "seconds": 9.0,
        }
        unit |= {"version": 1, "settings": {"facts": FACTS | {"model": "/somewhere"}, "task": {"limit": 1}}}
        folder = tmp_path / "qwen" / stage / "units"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{method}--{task}.json").write_text(json.dumps(unit), encoding="utf-8")
        (folder / f"{method}--{task}.part.jsonl").write_text("half", encoding="utf-8")
    found = script.collect("qwen", tmp_path)
    assert found == json.loads((tmp_path / "accuracy-qwen.json").read_text(encoding="utf-8"))
    assert found["facts"] == FACTS | {"model": "Qwen2.5-Coder-0.5B-Instruct"}
    stages = {name: [unit["method"] for unit in units] for name, units in found["stages"].items()}
    assert stages == {"book-2048": ["fp16", "kivi-4"], "gsm8k": ["fp16", "turbo-4"]}
    assert found["stages"]["book-2048"][0] == {
        "method": "fp16",
        "title": "FP16 (own cache)",
        "task": "perplexity",
        "metrics": {"kl": 0.333333},
        "settings": {"limit": 1},
    }


def test_collecting_keeps_what_was_measured_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("accuracy", monkeypatch)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    titles = {name: METHODS[name].title for name in ("fp16", "turbo-4", "kivi-4")}

    def measured(method: str, limit: int, dtype: str = "float32", weights: str = "a", stage: str = "gsm8k") -> None:
        unit = {"method": method, "title": titles[method], "task": "gsm8k", "metrics": {}}
        facts = {"model": "/somewhere", "weights": weights, "dtype": dtype}
        unit |= {"version": 1, "settings": {"facts": facts, "task": {"limit": limit}}}
        folder = tmp_path / "qwen" / stage / "units"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / f"{method}--gsm8k.json").write_text(json.dumps(unit), encoding="utf-8")

    def collected() -> dict[str, list[tuple[str, dict[str, Any]]]]:
        stages = script.collect("qwen", tmp_path)["stages"]
        return {name: [(unit["method"], unit["settings"]) for unit in units] for name, units in stages.items()}

    measured("fp16", 4, stage="book-2048")
    assert collected() == {"book-2048": [("fp16", {"limit": 4})]}
    shutil.rmtree(tmp_path / "qwen")
    measured("kivi-4", 4, dtype="bfloat16")
    asked = {"limit": 4, "dtype": "bfloat16"}
    assert collected() == {"book-2048": [("fp16", {"limit": 4})], "gsm8k": [("kivi-4", asked)]}
    measured("turbo-4", 4, dtype="bfloat16")
    assert collected()["gsm8k"] == [("kivi-4", asked), ("turbo-4", asked)]
    measured("turbo-4", 8, dtype="bfloat16")  # other questions: nothing that compares
    assert collected()["gsm8k"] == [("turbo-4", {"limit": 8, "dtype": "bfloat16"})]
    measured("turbo-4", 8, weights="b")  # another model
    assert collected() == {"gsm8k": [("turbo-4", {"limit": 8})]}


def test_the_plan_names_methods_and_tasks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = module("accuracy_plan", monkeypatch)
    for stage in plan.STAGES:
        if stage.calibrated:
            assert all(re.fullmatch(r"turbo-calibrated(-\d+(\.\d+)?)?", name) for name in stage.methods.split(","))
        else:
            parse_methods(stage.methods)
        names = stage.tasks.split(",")
        assert all(is_question_set(name) for name in names) == stage.wants_data
        if not stage.wants_data:
            check_names(names, None)


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
    for name in script.PAGES:
        assert script.BEGIN in (script.ROOT / name).read_text(encoding="utf-8")


def test_the_pages_say_what_the_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("accuracy", monkeypatch)
    documents = script.load()
    assert "bundled" in documents
    for name in script.PAGES:
        assert script.update(name, documents, check=True), name
