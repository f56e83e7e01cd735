from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from turboattention.errors import FormatError, GuardWarning, InputError
from turboattention.evaluation import suite
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.records import Records
from turboattention.evaluation.subject import attending

from .subject import ScriptedSubject, no_progress

METHOD_LIST: list[Any] = [METHODS["fp16"], METHODS["turbo-4"]]
FACTS = {"model": "scripted"}


class CountedTask:
    """Gives how often it was run."""

    name = "counted/task"

    def __init__(self, settings: dict[str, Any] | None = None, error: Exception | None = None):
        self.settings, self.error, self.runs = settings or {}, error, 0

    def together(self, subject: Any) -> int:
        return 1

    def run(self, subject: Any, methods: Any, parts: Any, progress: Any) -> list[dict[str, Any]]:
        self.runs += 1
        warnings.warn("layer 1: raised", GuardWarning, stacklevel=2)
        if self.error is not None:
            raise self.error
        return [{"metrics": {"runs": {"value": self.runs}}}]


class JointTask(CountedTask):
    """Takes two at a time. `breaks` is the method that fails; each warns for itself."""

    breaks = ""

    def together(self, subject: Any) -> int:
        return 2

    def run(self, subject: Any, methods: Any, parts: Any, progress: Any) -> list[dict[str, Any]]:
        self.groups = [*getattr(self, "groups", []), [method.name for method in methods]]
        for method in methods:
            parts.put(method.name, "0", "begun")
            said = attending.set(method.name)
            warnings.warn(f"of {method.name}", GuardWarning, stacklevel=2)
            attending.reset(said)
            if method.name == self.breaks:
                raise InputError("tokens: expected more")
        return [{"metrics": {}} for _ in methods]


@contextmanager
def silently(_: str):
    yield no_progress


def run(task: CountedTask, out: Path | None, facts: dict[str, Any] = FACTS) -> list[dict[str, Any]]:
    subject = ScriptedSubject({"": lambda text: "?"})
    return list(suite.run(subject, METHOD_LIST, [task], Records(out), facts, silently))


def test_a_second_run_measures_nothing(tmp_path: Path) -> None:
    task = CountedTask()
    first = run(task, tmp_path)
    second = run(task, tmp_path)
    assert task.runs == 2
    assert [unit | {"reused": True} for unit in first] == second
    assert [unit["warnings"] for unit in first] == [["layer 1: raised"]] * 2


def test_other_numerics_are_measured_again(tmp_path: Path) -> None:
    task, (own, ours) = CountedTask(), METHOD_LIST
    subject = ScriptedSubject({"": lambda text: "?"})
    run(task, tmp_path)
    methods = [own, replace(ours, numerics=ours.numerics + 1)]
    units = list(suite.run(subject, methods, [task], Records(tmp_path), FACTS, silently))
    assert [bool(unit.get("reused")) for unit in units] == [True, False]


def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    task = CountedTask()
    run(task, tmp_path)
    (tmp_path / "units" / "turbo-4--counted-task.json").unlink()
    assert [bool(unit.get("reused")) for unit in run(task, tmp_path)] == [True, False]
    assert task.runs == 3


def test_methods_go_in_groups(tmp_path: Path) -> None:
    task, methods = JointTask(), [METHODS[name] for name in ("fp16", "int8", "int4", "kivi-4", "kivi-2")]
    subject = ScriptedSubject({"": lambda text: "?"})
    list(suite.run(subject, methods[2:3], [task], Records(tmp_path), FACTS, silently))
    units = list(suite.run(subject, methods, [task], Records(tmp_path), FACTS, silently))
    assert task.groups == [["int4"], ["fp16", "int8"], ["kivi-4", "kivi-2"]]
    assert [unit["method"] for unit in units] == [method.name for method in methods]
    assert [unit["warnings"] for unit in units] == [[f"of {method.name}"] for method in methods]
    assert not list(tmp_path.glob("units/*.part.jsonl"))


def test_one_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    task, methods = JointTask(), [METHODS[name] for name in ("fp16", "int8", "int4")]
    task.breaks = "int8"
    units = list(suite.run(ScriptedSubject({"": str}), methods, [task], Records(tmp_path), FACTS, silently))
    assert [unit.get("failed") for unit in units] == [None, "tokens: expected more", None]
    assert [unit.get("warnings") for unit in units] == [["of fp16"], None, ["of int4"]]


def test_parts_that_hold_for_other_units_stay(tmp_path: Path) -> None:
    task = JointTask({"limit": 1})
    task.part_settings = {"set": "questions"}
    run(task, tmp_path)
    ours = METHOD_LIST[1]
    settings = {"facts": FACTS, "method": ours.settings, "task": {"set": "questions"}, "numerics": ours.numerics}
    parts = Records(tmp_path).parts(task.name, {"turbo-4": settings})
    assert parts.get("turbo-4", "0") == "begun"


def test_parts_of_other_settings_and_half_a_line_are_left(tmp_path: Path) -> None:
    parts = Records(tmp_path).parts("t", {"a": {"limit": 1}, "b": {}})
    for method in "ab":
        parts.put(method, "0", [1, 2])
        parts.put(method, "1", {"x": 3})
    assert (parts.get("a", "1"), parts.get("a", "2")) == ({"x": 3}, None)
    path = tmp_path / "units" / "b--t.part.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-4], encoding="utf-8")
    again = Records(tmp_path).parts("t", {"a": {"limit": 2}, "b": {}})
    assert [again.get(method, key) for method in "ab" for key in "01"] == [None, None, [1, 2], None]
    again.put("b", "1", 4)
    again.put("a", "5", 6)
    last = Records(tmp_path).parts("t", {"a": {"limit": 2}, "b": {}})
    assert [last.get("a", "0"), last.get("a", "5"), last.get("b", "0"), last.get("b", "1")] == [None, 6, [1, 2], 4]
    last.drop("b")
    assert not path.exists()


@pytest.mark.parametrize(("settings", "facts"), [({"limit": 2}, FACTS), ({}, {"model": "another"})])
def test_other_settings_are_measured_anew(tmp_path: Path, settings: dict, facts: dict) -> None:
    run(CountedTask(), tmp_path)
    task = CountedTask(settings)
    run(task, tmp_path, facts)
    assert task.runs == 2


def test_without_a_folder_nothing_is_kept() -> None:
    task = CountedTask()
    run(task, None)
    run(task, None)
    assert task.runs == 4


def test_a_failure_is_told_and_tried_again(tmp_path: Path) -> None:
    task = CountedTask(error=InputError("budget: expected more"))
    assert [unit["failed"] for unit in run(task, tmp_path)] == ["budget: expected more"] * 2
    run(task, tmp_path)
    assert task.runs == 4


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run(CountedTask(), tmp_path)
    path = tmp_path / "units" / "fp16--counted-task.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    with pytest.raises(FormatError, match=r"fp16--counted-task\.json is damaged"):
        run(CountedTask(), tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out: .* cannot be made"):
        Records(tmp_path / "file")


def test_a_folder_is_made_for_the_first_result(tmp_path: Path, file_limit) -> None:
    out, unit = tmp_path / "new" / "out", {"method": "fp16", "task": "t", "text": "x" * 1000}
    records = Records(out)
    with file_limit(100), pytest.raises(InputError, match=r"--out: .* cannot be written: .*File too large"):
        records.keep(unit)
    assert not (tmp_path / "new").exists()
    records.keep(unit)
    assert (out / "units" / "fp16--t.json").exists()


def test_lengths_stay_within_the_context() -> None:
    (task,) = suite.make_tasks(["recall"], suite.Options("some text", "text"), 2048)
    assert task.settings["lengths"] == [512, 1024, 1952]
    (task,) = suite.make_tasks(["recall"], suite.Options("some text", "text", lengths=(100, 5000, 9000)), 2048)
    assert task.settings["lengths"] == [100, 1952]


def test_a_passage_and_a_bos_fit_the_context() -> None:
    (task,) = suite.make_tasks(["perplexity"], suite.Options("some text", "text"), 2048)
    assert task.settings["context"] == 2047


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(InputError, match=r"tasks: expected some of perplexity, growth, heads, recall, .*; got 'recal'"):
        suite.check_names(["recall", "recal"], None)
    with pytest.raises(InputError, match="tasks: expected at least one"):
        suite.check_names([], None)
