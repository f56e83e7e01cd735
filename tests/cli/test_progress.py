"""Progress where stderr is no terminal."""

from __future__ import annotations

import pytest

from turboattention.cli import progress


def test_a_long_task_says_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 29.0, 31.0, 45.0, 75.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.Bars(hidden=False).task("perplexity") as update:
        for done in range(5):
            update(done, 9)
    assert capsys.readouterr().err.splitlines() == [
        "note: perplexity: 2 of 9 parts after 31 s",
        "note: perplexity: 4 of 9 parts after 75 s",
    ]


def test_a_hidden_task_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0)
    with progress.Bars(hidden=True).task("perplexity") as update:
        update(1, 9)
    assert capsys.readouterr().err == ""
