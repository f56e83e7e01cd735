"""The generated tasks (look-ups, needles, copies, sums) asked through a method's cache, by context length.

The context is read as a prompt; the question goes through the cache like decoded text, and so does the answer, token
by token. An answer is right where each of its tokens, steps included, is the likeliest one: that is what greedy
decoding would write. Several questions share a context, each after the right answers to those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from . import tasks
from .baselines import CacheMethod
from .intervals import share
from .subject import PIECE, Progress, Session, Subject

QUESTIONS = 8
"""To a context, which takes longer to read than they take to answer."""
SEED = 20_000_000
"""Far from the seeds that the bundled model was trained and measured with."""


class GeneratedTask:
    """`limit` questions of one family of `evaluation.tasks` at each context length. A length too short for them
    raises InputError.

    Args:
        name: one of ``tasks.TASKS``. lengths: tokens of context, questions included. prose: hides the needles.
    """

    def __init__(self, name: str, lengths: Sequence[int], limit: int, prose: str | None, source: str):
        self.name, self._lengths, self._limit = name, list(lengths), limit
        self._prose, self._source = (prose, source) if name == "needle" else (None, "")

    @property
    def settings(self) -> dict[str, Any]:
        prose = {"text": self._source} if self._prose else {}
        return {"lengths": self._lengths, "questions": self._limit, "seed": SEED, "piece": PIECE} | prose

    def run(self, subject: Subject, method: CacheMethod, progress: Progress) -> dict[str, Any]:
        """`accuracy` over all lengths, `by_length`, and the bits at the longest."""
        per_length = -(-self._limit // QUESTIONS)
        total = per_length * len(self._lengths)
        by_length, bits, done = [], 0.0, 0
        for length in self._lengths:
            solved: list[bool] = []
            for index in range(per_length):
                progress(done, total)
                questions = min(QUESTIONS, self._limit - index * QUESTIONS)
                some, bits = self._ask(subject, method, length, SEED + index, questions)
                solved, done = solved + some, done + 1
            # Question by question, so that two methods can be compared on the same ones.
            row = {"length": length, "right": sum(solved), "asked": len(solved), "solved": [int(x) for x in solved]}
            by_length.append(row | share(row["right"], row["asked"]))
        total_right, total_asked = (sum(row[name] for row in by_length) for name in ("right", "asked"))
        return {
            "bits_per_element": bits,
            "metrics": {"accuracy": share(total_right, total_asked)},
            "by_length": by_length,
        }

    def _ask(
        self, subject: Subject, method: CacheMethod, length: int, seed: int, questions: int
    ) -> tuple[list[bool], float]:
        try:
            episode = tasks.generate(
                self.name,
                seed,
                length - len(subject.begin),
                measure=lambda text: len(subject.encode(text)),
                questions=questions,
                prose=self._prose,
            )
        except ValueError as error:
            message = f"lengths: expected contexts that hold {questions} questions of {self.name}, got {length} tokens"
            raise InputError(message) from error
        spans = [subject.encode(text) for text, _ in episode.spans]
        session = subject.open(method)
        session.read([*subject.begin, *spans[0]])
        # After the context questions and answers take turns.
        solved = [answers(session, *pair) for pair in zip(spans[1::2], spans[2::2], strict=True)]
        return solved, session.bits_per_element


def answers(session: Session, question: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether greedy decoding answers; the session has taken the question and the right answer afterwards."""
    logits = session.feed(question)
    for at, token in enumerate(answer):
        if int(logits[-1].argmax()) != token:
            session.feed(answer[at:])
            return False
        logits = session.feed([token])
    return True
