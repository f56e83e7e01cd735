"""Generated tasks: the same from the same seed, within budget, and right."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.evaluation import tasks
from turboattention.evaluation.tasks import TASKS, Episode, addition, generate

BUDGETS = (300, 800, 3000)


def answers(episode: Episode) -> list[tuple[str, str]]:
    """(question, answer) pairs at the end."""
    spans = episode.spans
    return [(spans[i - 1][0], text) for i, (text, is_answer) in enumerate(spans) if is_answer]


# -- every task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task):
    assert generate(task, 3, 800) == generate(task, 3, 800)
    assert len({generate(task, seed, 800).text for seed in range(20)}) == 20
    assert [e.text for e in tasks.episodes(task, 3, 800, seed=5)] == [generate(task, s, 800).text for s in (5, 6, 7)]


DIGESTS = {
    "recall": "6a6db1b7d0141df9",
    "needle": "96d825a5d86fe455",
    "copy": "9ce737913ab6d2e3",
    "arithmetic": "f6ede6ad40f78eac",
}


@pytest.mark.parametrize("task", TASKS)
def test_the_text_is_the_same_on_every_machine(task):
    """Recorded results are of these very texts."""
    text = "".join(episode.text for episode in tasks.episodes(task, 5, 2000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[task]


@pytest.mark.parametrize("task", TASKS)
@given(st.integers(0, 10**6), st.sampled_from((800, 3000)), st.integers(1, 3))
def test_never_more_than_the_budget_and_close_to_it(task, seed, budget, questions):
    episode = generate(task, seed, budget, questions=questions)
    assert len(episode.text) <= budget
    # One line is the grain, and room is kept for the longest possible question.
    assert len(episode.text) >= budget - 170 - questions * 150
    assert len(answers(episode)) == questions or task in ("recall", "copy")


@pytest.mark.parametrize("task", TASKS)
def test_the_budget_counts_what_the_measure_counts(task):
    def words(text: str) -> int:
        return len(re.findall(r"\w+|\W", text))

    for seed in range(20):
        episode = generate(task, seed, 600, measure=words)
        assert words(episode.text) <= 600
        assert words(episode.text) >= 350


@pytest.mark.parametrize("task", TASKS)
def test_text_and_spans(task):
    episode = generate(task, 1, 800, questions=2)
    assert episode.task == task
    assert episode.text == "".join(text for text, _ in episode.spans)
    (_, first_is_answer), *_, (last, last_is_answer) = episode.spans
    assert not first_is_answer
    assert last_is_answer
    assert last.endswith("\n")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("budget", [-5, 0, 10, 30])
def test_a_budget_too_small(task, budget):
    with pytest.raises(ValueError, match=r"^budget: expected room "):
        generate(task, 0, budget)


def test_an_unknown_task():
    with pytest.raises(ValueError, match=r"^task: expected one of recall, needle, copy, arithmetic, got 'chess'$"):
        generate("chess", 0, 800)


# -- each task's answers, found again from its text ------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(BUDGETS), st.integers(1, 4))
def test_recall_can_be_looked_up(seed, budget, questions):
    episode = generate("recall", seed, budget, questions=questions)
    table, _ = episode.spans[0][0].split("Look up.\n")
    lines = table.removeprefix("Table.\n").splitlines()
    known = dict(line.split("=") for line in lines)
    assert len(known) == len(lines)  # no key twice
    assert all(re.fullmatch(r"[a-z]+ [a-z]+=\d{4}", line) for line in lines)
    pairs = answers(episode)
    assert len({question for question, _ in pairs}) == len(pairs) >= 1
    for question, answer in pairs:
        assert answer == known[question.removesuffix("=")] + "\n"


@given(st.integers(0, 10**6), st.sampled_from(BUDGETS), st.integers(1, 2))
def test_needles_are_in_the_hay(seed, budget, questions):
    episode = generate("needle", seed, budget, questions=questions)
    hay = episode.spans[0][0]
    found = dict(re.findall(r"The secret number of (\w+) is (\d{5})\.\n", hay))
    assert len(found) == questions
    for question, answer in answers(episode):
        name = re.fullmatch(r"The secret number of (\w+) is ", question)
        assert answer == found[name[1]] + ".\n"
    assert {re.search(r"of (\w+) is", q)[1] for q, _ in answers(episode)} == set(found)


def test_needles_hide_in_given_prose():
    prose = "\n".join(f"Line {i} of a book that goes on and on about nothing much." for i in range(200))
    starts = set()
    for seed in range(10):
        episode = generate("needle", seed, 900, prose=prose)
        hay = [line for line in episode.spans[0][0].splitlines() if "secret" not in line]
        assert all(line in prose for line in hay)
        assert len(hay) > 8
        starts.add(hay[0])
    assert len(starts) > 3  # a random passage


def test_short_prose_is_filled_up():
    episode = generate("needle", 0, 900, prose="A single line.\n")
    assert "A single line.\n" in episode.text
    assert len(episode.text) > 700


@given(st.integers(0, 10**6), st.sampled_from((600, 3000)), st.integers(1, 2))
def test_lines_to_copy_are_there_once(seed, budget, questions):
    episode = generate("copy", seed, budget, questions=questions)
    shown = episode.spans[0][0].removeprefix("Lines.\n").removesuffix("Copy.\n").splitlines()
    pairs = answers(episode)
    assert len(pairs) >= 1
    for question, answer in pairs:
        matches = [line for line in shown if line.startswith(question + " ")]
        assert matches == [question + answer.rstrip("\n")]
        assert len(question.split(" ")) == 2
        assert 6 <= len(answer.split()) <= 14


@given(st.integers(0, 10**6), st.sampled_from(BUDGETS), st.integers(1, 3))
def test_sums_are_right(seed, budget, questions):
    episode = generate("arithmetic", seed, budget, questions=questions)
    lines = episode.text.removeprefix("Sums.\n").splitlines()
    assert len(lines) >= questions
    for line in lines:
        a, b, steps, total = re.fullmatch(r"(\d+)\+(\d+): (.*) so (\d+)", line).groups()
        assert int(a) + int(b) == int(total)
        assert 2 <= len(a) == len(b) <= 4
        carry, digits = 0, ""
        for step, x, y in zip(steps.split(" "), reversed(a), reversed(b), strict=True):
            p, q, c, s = re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", step).groups()
            assert (p, q, int(c)) == (x, y, carry)
            assert int(p) + int(q) + int(c) == int(s)
            carry, digits = int(s[0]), s[1] + digits
        assert int((str(carry) if carry else "") + digits) == int(total)
    assert len(answers(episode)) == questions


@pytest.mark.parametrize(
    "a, b, answer",
    [
        (58, 67, " 8+7+0=15 5+6+1=12 so 125\n"),
        (10, 20, " 0+0+0=00 1+2+0=03 so 30\n"),
        (999, 1, " 9+1+0=10 9+0+1=10 9+0+1=10 so 1000\n"),
        (0, 0, " 0+0+0=00 so 0\n"),
    ],
)
def test_addition_by_hand(a, b, answer):
    assert addition(a, b) == (f"{a}+{b}:", answer)
