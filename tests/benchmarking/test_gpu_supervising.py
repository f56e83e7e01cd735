"""Steps of a session on a GPU as processes: crashes, hangs, budgets, and going on with what is not done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..scripts import benchmark_script


@pytest.fixture(scope="module")
def supervising():
    with benchmark_script("gpu/supervising.py") as module:
        yield module


CODE = {
    "fine": "print('said')",
    "wrong": "raise SystemExit(3)",
    "crash": "import os; os.abort()",
    "hang": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
}


def run(supervising, folder: Path, names: list[str], budget: float = 60.0, **options):
    steps = [supervising.Step(name, 2.0 if name == "hang" else 20.0, **options.get(name, {})) for name in names]
    results = supervising.Results(folder / "results.jsonl")

    def command(step) -> list[str]:
        return [sys.executable, "-c", CODE[step.name]]

    return supervising.run_steps(steps, command, results, folder / "log.txt", budget), results


def test_each_step_ends_alone(supervising, tmp_path):
    counts, results = run(supervising, tmp_path, ["crash", "hang", "wrong", "fine"])
    assert counts == {"crashed": 1, "timed out": 1, "wrong": 1, "done": 1}
    assert results.ended() == {"crash": "crashed", "hang": "timed out", "wrong": "wrong", "fine": "done"}
    assert "said" in (tmp_path / "log.txt").read_text()


def test_a_second_run_goes_on_with_what_is_not_done(supervising, tmp_path):
    run(supervising, tmp_path, ["fine", "wrong"])
    counts, _ = run(supervising, tmp_path, ["fine", "wrong"])
    assert counts == {"wrong": 1}


def test_what_needs_sound_results_is_left_out_where_they_are_wrong(supervising, tmp_path):
    counts, results = run(supervising, tmp_path, ["wrong", "fine"], fine={"sound": ("wrong",)})
    assert counts == {"wrong": 1, "skipped": 1}
    (line,) = (row for row in results.path.read_text().splitlines() if "skipped" in row)
    assert '"why": "wrong wrong"' in line


def test_steps_side_by_side(supervising, tmp_path):
    beside = {name: {"beside": True} for name in ("fine", "crash", "wrong")}
    counts, _ = run(supervising, tmp_path, ["fine", "crash", "wrong"], **beside)
    assert counts == {"done": 1, "crashed": 1, "wrong": 1}


def test_nothing_starts_without_time(supervising, tmp_path):
    counts, _ = run(supervising, tmp_path, ["fine"], budget=1.0)
    assert counts == {"skipped": 1}


def test_rows_outlive_a_line_that_was_cut_off(supervising, tmp_path):
    results = supervising.Results(tmp_path / "results.jsonl")
    results.write("sweep", key="a", seconds=1.0)
    with results.path.open("a") as file:
        file.write('{"step": "sweep", "key": "b", "sec')
    results.write("sweep", key="c", seconds=2.0)
    assert [row["key"] for row in results.rows("sweep")] == ["a", "c"]


def test_results_of_other_sources_are_kept_apart(supervising, tmp_path):
    results = supervising.Results(tmp_path / "results.jsonl")
    assert results.keep_apart("a" * 40) is None
    results.write("session", commit="a" * 40)
    results.write("gate", ended="done")
    assert results.keep_apart("a" * 40) is None
    assert results.keep_apart("unknown") is None
    kept = results.keep_apart("b" * 40)
    assert kept.name == "results-aaaaaaaaaaaa-1.jsonl"
    assert results.ended() == {}
    assert supervising.Results(kept).ended() == {"gate": "done"}


def test_steps_without_time_are_known(supervising, tmp_path):
    _, results = run(supervising, tmp_path, ["fine"], budget=0.0)
    assert results.skipped_for(supervising.NO_TIME)
    assert not results.skipped_for("gate wrong")


def test_what_probably_fits_a_budget(supervising):
    """Steps side by side take as long as the longest; once one does not fit, none after it does."""
    step = supervising.Step
    steps = [step("a", 60, 10), step("b", 60, 40, beside=True), step("c", 60, 30, beside=True), step("d", 60, 60)]
    steps.append(step("e", 60, 1))
    assert supervising.outlook(steps, 50) == (["a", "b", "c"], ["d", "e"])
    assert supervising.outlook(steps, 111) == (["a", "b", "c", "d", "e"], [])
    assert supervising.outlook(steps, 5) == ([], ["a", "b", "c", "d", "e"])
