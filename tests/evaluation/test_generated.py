from __future__ import annotations

import re

import pytest

from turboattention.evaluation import tasks
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.generated import GeneratedTask

from .subject import ScriptedSubject, run_alone

TURBO = METHODS["turbo-4"]


def looks_up(text: str) -> str:
    """Finds the key before the last "=" in the table, and goes on as that line does."""
    line = text[text.rfind("\n") + 1 :]
    key, equals, begun = line.partition("=")
    found = re.search(rf"\n{re.escape(key)}={re.escape(begun)}(.|\n)", text[: text.rfind("\n") + 1]) if equals else None
    return found.group(1) if found else "?"


def forgets_long_ago(text: str) -> str:
    return looks_up(text[-1500:])


def run(subject: ScriptedSubject, name: str = "recall", lengths: tuple[int, ...] = (600,), limit: int = 11) -> dict:
    return run_alone(GeneratedTask(name, lengths, limit, None, ""), subject, TURBO)


def test_one_that_looks_up_is_right() -> None:
    result = run(ScriptedSubject({"": looks_up}))
    assert result["metrics"]["accuracy"]["value"] == 1.0
    assert [(row["length"], row["right"], row["asked"]) for row in result["by_length"]] == [(600, 11, 11)]


def test_one_that_does_not_is_wrong() -> None:
    assert run(ScriptedSubject({"": lambda text: "7"}))["metrics"]["accuracy"]["value"] == 0.0


def test_one_that_forgets_fails_at_long_contexts() -> None:
    short, long = run(ScriptedSubject({"": forgets_long_ago}), lengths=(1000, 6000), limit=32)["by_length"]
    assert short["value"] == 1.0
    assert long["value"] < 0.6


def test_context_is_read_and_the_rest_goes_through_the_cache_token_by_token() -> None:
    subject = ScriptedSubject({"": looks_up})
    run(subject, limit=2)
    (session,) = subject.sessions
    (reading, context), *rest = session.calls
    assert reading
    assert context.startswith("\x01Table.\n")
    assert context.endswith("Look up.\n")
    assert not any(reading for reading, _ in rest)
    question, *answer = (text for _, text in rest[:6])
    assert question.endswith("=")
    assert re.fullmatch(r"\d{4}\n", "".join(answer))
    assert all(len(token) == 1 for token in answer)


def test_a_wrong_answer_is_not_what_the_next_question_follows() -> None:
    subject = ScriptedSubject({"": lambda text: "?"})
    run(subject, limit=2)
    table = subject.sessions[0].text
    for line in table.split("Look up.\n")[1].splitlines():
        assert f"\n{line}\n" in table.split("Look up.\n")[0]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_family_fits_its_length(name: str) -> None:
    subject = ScriptedSubject({"": lambda text: "?"})
    run(subject, name, (900,), 1)
    assert len(subject.sessions[0].text) <= 900
