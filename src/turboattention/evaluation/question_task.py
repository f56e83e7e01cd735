"""A question set over methods' caches: worked examples as the prompt, then the question, then greedy decoding.

The worked examples are read once per method, and every question continues from a copy of that cache. The answers of all
methods to several questions are decoded in one batch, so that the weights are read once per step; a finished answer is
replaced by the next question.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .baselines import CacheMethod
from .intervals import share
from .questions import Question, QuestionSet
from .records import Parts, fingerprint
from .subject import Progress, Session, Subject

SHOWN = 3
"""Number of generated answers that are saved in the results, for inspection."""
ROWS = 192
"""Answers decoded at the same time, over all methods: matrix products over 96 rows reach two thirds of the speed that
they have over 256."""


@dataclass(eq=False)
class _Answer:
    """One method's answer to one question in progress, after `shots` examples; `next` is the token to feed next."""

    method: CacheMethod
    index: int
    shots: int
    session: Session
    next: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""


class QuestionTask:
    """The first `limit` questions of a set (None: all)."""

    def __init__(self, questions: QuestionSet, limit: int | None):
        self._set, self._questions = questions, questions.questions[:limit]
        self.name = questions.name

    @property
    def settings(self) -> dict[str, Any]:
        return {"questions": len(self._questions)} | self._settings(self._questions)

    @property
    def part_settings(self) -> dict[str, Any]:
        """The settings that an answer depends on; the number of questions is not one of them."""
        return self._settings(self._set.questions)

    def _settings(self, questions: Sequence[Question]) -> dict[str, Any]:
        contents = fingerprint(repr((self._set.context(len(self._set.examples)), questions)))
        chat = {"chat": True} if self._set.chat else {}
        return {"contents": contents, "max_new_tokens": self._set.max_new_tokens} | chat

    def together(self, subject: Subject) -> int:
        return ROWS // 4  # leaves room for several questions at a time

    def run(
        self, subject: Subject, methods: Sequence[CacheMethod], parts: Parts, progress: Progress
    ) -> list[dict[str, Any]]:
        """`accuracy`, the proportion of texts with an answer, and the smallest number of worked examples."""
        self._ask(subject, methods, parts, progress)
        return [self._summary([parts.get(m.name, str(at)) for at in range(len(self._questions))]) for m in methods]

    def _summary(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        total = len(self._questions)
        pairs = list(zip(answers, self._questions, strict=True))
        right = [int(answer["answer"] == question.target) for answer, question in pairs]
        found = sum(answer["answer"] is not None for answer in answers)
        shown = [
            {"generated": answer["text"], "answer": answer["answer"], "target": question.target}
            for answer, question in pairs[:SHOWN]
        ]
        return {
            "bits_per_element": sum(answer["bits"] for answer in answers) / total,
            "metrics": {"accuracy": share(sum(right), total), "answered": share(found, total)},
            "questions": total,
            "solved": right,  # per question, so that two methods can be compared on the same questions
            "fewest_shots": min(answer["shots"] for answer in answers),
            "shown": shown,
        }

    def _ask(self, subject: Subject, methods: Sequence[CacheMethod], parts: Parts, progress: Progress) -> None:
        """Fill `parts` with one answer per method and question."""
        total = len(methods) * len(self._questions)
        waiting = deque(range(len(self._questions)))
        contexts: dict[tuple[str, int], Session] = {}
        writing: list[_Answer] = []
        while waiting or writing:
            while waiting and len(writing) + len(methods) <= max(ROWS, len(methods)):
                writing += self._begin(subject, methods, waiting.popleft(), parts, contexts)
            done = [answer for answer in writing if not self._goes_on(subject, answer)]
            for answer in done:
                parts.put(answer.method.name, str(answer.index), self._ended(answer))
            writing = [answer for answer in writing if answer not in done]
            progress(max(total - len(methods) * len(waiting) - len(writing) - 1, 0), total)
            if writing:
                logits = subject.feed_together([a.session for a in writing], [[a.next] for a in writing])
                for answer, row in zip(writing, logits[:, -1].argmax(-1).tolist(), strict=True):
                    answer.next = row

    def _begin(
        self,
        subject: Subject,
        methods: Sequence[CacheMethod],
        index: int,
        parts: Parts,
        contexts: dict[tuple[str, int], Session],
    ) -> list[_Answer]:
        """Sessions of all methods that have not answered the question yet, after reading it."""
        methods = [method for method in methods if parts.get(method.name, str(index)) is None]
        if not methods:
            return []
        asked = subject.encode(self._questions[index].prompt)
        context, shots = self._context(subject, len(asked))
        sessions = []
        for method in methods:
            if (method.name, shots) not in contexts:
                contexts[method.name, shots] = subject.open(method)
                contexts[method.name, shots].read([*subject.begin, *context])
            sessions.append(contexts[method.name, shots].fork())
        logits = subject.feed_together(sessions, [asked] * len(sessions), last=True)[:, -1]
        found = zip(methods, sessions, logits.argmax(-1).tolist(), strict=True)
        return [_Answer(method, index, shots, session, token) for method, session, token in found]

    def _goes_on(self, subject: Subject, answer: _Answer) -> bool:
        """Append the next token of the answer; returns whether the answer continues."""
        if answer.next in subject.stop_tokens:
            return False
        answer.tokens.append(answer.next)
        answer.text = subject.decode(answer.tokens)
        return len(answer.tokens) < self._set.max_new_tokens and self._set.until_stop(answer.text) == answer.text

    def _ended(self, answer: _Answer) -> dict[str, Any]:
        return {
            "text": answer.text,
            "answer": self._set.extract(self._set.until_stop(answer.text)),
            "bits": answer.session.bits_per_element,
            "shots": answer.shots,
        }

    def _context(self, subject: Subject, asked: int) -> tuple[list[int], int]:
        """Tokens of as many worked examples as fit together with the question and its answer."""
        room = (subject.context or 2**31) - len(subject.begin) - asked - self._set.max_new_tokens
        for shots in range(len(self._set.examples), -1, -1):
            ids = self._shots(subject, shots)
            if len(ids) <= room:
                return ids, shots
        raise InputError(f"{self.name}: expected questions that fit the model's context, got one that does not")

    def _shots(self, subject: Subject, shots: int) -> list[int]:
        return subject.encode(self._set.context(shots)) if shots or self._set.head else []
