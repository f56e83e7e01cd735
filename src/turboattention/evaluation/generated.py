"""The generated tasks (look-ups, needles, copies, sums) over a method's cache, by context length.

The context is read as a prompt. The question, and then the answer token by token, go through the cache like decoded
text, with several methods side by side. An answer is correct if each of its tokens is the most likely one, so that
greedy decoding would generate it. Several questions share a context; each follows the correct answers to the previous
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..words import number_of
from . import tasks
from .baselines import CacheMethod
from .intervals import share
from .records import Parts
from .subject import PIECE, Progress, Session, Subject

QUESTIONS = 8
"""Questions per context. Reading a context takes longer than answering them."""
MOST_TOGETHER = 12
SEED = 20_000_000
"""Different from the seeds with which the bundled model was trained and measured."""


class GeneratedTask:
    """`limit` questions of one family of `evaluation.tasks` at each context length.

    Args:
        name: one of ``tasks.TASKS``.
        lengths: tokens of the contexts, including the questions.
        prose: the text in which needles are hidden; `source` names it in results.
    """

    def __init__(self, name: str, lengths: Sequence[int], limit: int, prose: str | None, source: str):
        self.name, self._lengths, self._limit = name, list(lengths), limit
        self._prose, self._source = (prose, source) if name == "needle" else (None, "")

    @property
    def settings(self) -> dict[str, Any]:
        prose = {"text": self._source} if self._prose else {}
        return {"lengths": self._lengths, "questions": self._limit, "seed": SEED, "piece": PIECE} | prose

    def together(self, subject: Subject) -> int:
        return MOST_TOGETHER

    def run(
        self, subject: Subject, methods: Sequence[CacheMethod], parts: Parts, progress: Progress
    ) -> list[dict[str, Any]]:
        """`accuracy` over all lengths, `by_length`, and the bits per element at the longest.

        Raises:
            InputError: a length is too short for the questions.
        """
        contexts = [
            (length, index, min(QUESTIONS, self._limit - index * QUESTIONS))
            for length in self._lengths
            for index in range(-(-self._limit // QUESTIONS))
        ]
        for done, (length, index, questions) in enumerate(contexts):
            progress(done, len(contexts))
            key = f"{length}/{index}"
            missing = [method for method in methods if parts.get(method.name, key) is None]
            if missing:
                found = self._ask(subject, missing, length, SEED + index, questions)
                for method, one in zip(missing, found, strict=True):
                    parts.put(method.name, key, one)
        return [self._summary({c: parts.get(method.name, f"{c[0]}/{c[1]}") for c in contexts}) for method in methods]

    def _summary(self, found: dict[tuple[int, int, int], dict[str, Any]]) -> dict[str, Any]:
        by_length, bits = [], 0.0
        for length in self._lengths:
            ones = [one for context, one in found.items() if context[0] == length]
            # Per question, so that two methods can be compared on the same questions.
            solved, bits = [x for one in ones for x in one["solved"]], ones[-1]["bits"]
            row = {"length": length, "right": sum(solved), "asked": len(solved), "solved": solved}
            by_length.append(row | share(row["right"], row["asked"]))
        total_right, total_asked = (sum(row[name] for row in by_length) for name in ("right", "asked"))
        return {
            "bits_per_element": bits,
            "metrics": {"accuracy": share(total_right, total_asked)},
            "by_length": by_length,
        }

    def _ask(
        self, subject: Subject, methods: Sequence[CacheMethod], length: int, seed: int, questions: int
    ) -> list[dict[str, Any]]:
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
            held = f"{number_of(questions, 'question')} of {self.name}"
            message = f"--lengths: expected contexts that hold {held}, got {number_of(length, 'token')}"
            raise InputError(message) from error
        spans = [subject.encode(text) for text, _ in episode.spans]
        sessions = [subject.open(method) for method in methods]
        for session in sessions:
            session.read([*subject.begin, *spans[0]])
        # After the context, questions and answers alternate.
        solved = [answers(subject, sessions, *pair) for pair in zip(spans[1::2], spans[2::2], strict=True)]
        return [
            {"solved": [int(one[at]) for one in solved], "bits": session.bits_per_element}
            for at, session in enumerate(sessions)
        ]


def answers(
    subject: Subject, sessions: Sequence[Session], question: Sequence[int], answer: Sequence[int]
) -> list[bool]:
    """Whether greedy decoding gives the answer, per session. Afterwards sessions contain the question and answer."""
    right = [True] * len(sessions)
    pieces = [question[at : at + PIECE] for at in range(0, len(question), PIECE)]
    *_, logits = (subject.feed_together(sessions, [piece] * len(sessions)) for piece in pieces)
    for token in answer:
        right = [was and int(row.argmax()) == token for was, row in zip(right, logits[:, -1], strict=True)]
        logits = subject.feed_together(sessions, [[token]] * len(sessions))
    return right
