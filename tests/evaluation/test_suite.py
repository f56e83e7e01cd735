from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from turboattention.errors import FormatError, GuardWarning, InputError
from turboattention.evaluation import suite
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.records import Records

from .subject import ScriptedSubject, no_progress

METHOD_LIST = [METHODS["fp16"], METHODS["turbo-4"]]
FACTS = {"model": "scripted"}


class CountedTask:
    """Gives how often it was run."""

    name = "counted/task"

    def __init__(self, settings: dict[str, Any] | None = None, error: Exception | None = None):
        self.settings, self.error, self.runs = settings or {}, error, 0

    def run(self, subject: Any, method: Any, progress: Any) -> dict[str, Any]:
        self.runs += 1
        warnings.warn("layer 1: raised", GuardWarning, stacklevel=2)
        if self.error is not None:
            raise self.error
        return {"metrics": {"runs": {"value": self.runs}}}


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


def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    task = CountedTask()
    run(task, tmp_path)
    (tmp_path / "units" / "turbo-4--counted-task.json").unlink()
    assert [bool(unit.get("reused")) for unit in run(task, tmp_path)] == [True, False]
    assert task.runs == 3


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


def test_lengths_stay_within_the_context() -> None:
    (task,) = suite.make_tasks(["recall"], suite.Options("some text", "text"), 2048)
    assert task.settings["lengths"] == [512, 1024, 1952]
    (task,) = suite.make_tasks(["recall"], suite.Options("some text", "text", lengths=(100, 5000, 9000)), 2048)
    assert task.settings["lengths"] == [100, 1952]


def test_a_passage_and_a_bos_fit_the_context() -> None:
    (task,) = suite.make_tasks(["perplexity"], suite.Options("some text", "text"), 2048)
    assert task.settings["context"] == 2047


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(InputError, match=r"tasks: expected some of perplexity, heads, recall, .*; got 'recal'"):
        suite.check_names(["recall", "recal"], None)
    with pytest.raises(InputError, match="tasks: expected at least one"):
        suite.check_names([], None)
