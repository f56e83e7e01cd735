"""A question set asked through a method's cache: worked examples as the prompt, then the question, then greedy text."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .baselines import CacheMethod
from .intervals import share
from .questions import Question, QuestionSet
from .records import fingerprint
from .subject import PIECE, Progress, Subject

SHOWN = 3
"""Generated answers kept in the results, to look at."""


class QuestionTask:
    """The first `limit` questions of a set (None: all)."""

    def __init__(self, questions: QuestionSet, limit: int | None):
        self._set, self._questions = questions, questions.questions[:limit]
        self.name = questions.name

    @property
    def settings(self) -> dict[str, Any]:
        contents = fingerprint(repr((self._set.context(len(self._set.shots)), self._questions)))
        return {
            "questions": len(self._questions),
            "contents": contents,
            "max_new_tokens": self._set.max_new_tokens,
            "piece": PIECE,
        }

    def run(self, subject: Subject, method: CacheMethod, progress: Progress) -> dict[str, Any]:
        """`accuracy`, the share of answers found at all, and the fewest worked examples that a question had."""
        right = found = 0
        bits, shots, shown = [], [], []
        for index, question in enumerate(self._questions):
            progress(index, len(self._questions))
            text, used, size = self._generate(subject, method, question)
            answer = self._set.extract(self._set.until_stop(text))
            right, found = right + (answer == question.target), found + (answer is not None)
            bits.append(size)
            shots.append(used)
            if len(shown) < SHOWN:
                shown.append({"generated": text, "answer": answer, "target": question.target})
        total = len(self._questions)
        return {
            "bits_per_element": sum(bits) / total,
            "metrics": {"accuracy": share(right, total), "answered": share(found, total)},
            "questions": total,
            "fewest_shots": min(shots),
            "shown": shown,
        }

    def _generate(self, subject: Subject, method: CacheMethod, question: Question) -> tuple[str, int, float]:
        asked = subject.encode(question.prompt)
        context, shots = self._context(subject, len(asked))
        session = subject.open(method)
        session.read([*subject.begin, *context])
        logits, tokens, text = session.feed(asked), [], ""
        while len(tokens) < self._set.max_new_tokens:
            token = int(logits[-1].argmax())
            if token in subject.stop_tokens:
                break
            tokens.append(token)
            text = subject.decode(tokens)
            if self._set.until_stop(text) != text:
                break
            logits = session.feed([token])
        return text, shots, session.bits_per_element

    def _context(self, subject: Subject, asked: int) -> tuple[list[int], int]:
        """Tokens of as many worked examples as leave room for the question and its answer."""
        room = (subject.context or 2**31) - len(subject.begin) - asked - self._set.max_new_tokens
        for shots in range(len(self._set.shots), -1, -1):
            ids = subject.encode(self._set.context(shots)) if shots or self._set.head else []
            if len(ids) <= room:
                return ids, shots
        raise InputError(f"{self.name}: expected questions that fit the model's context, got one that does not")
