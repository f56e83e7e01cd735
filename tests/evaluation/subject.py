"""A subject that is a table of what follows what: characters are tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turboattention.evaluation.records import Part, Parts

VOCABULARY = 128
NEXT = Callable[[str], str]
"""From everything so far to the character that comes next."""


class ScriptedSession:
    """`calls` are the pieces that were read (True) or fed (False)."""

    bits_per_element = 4.25

    def __init__(self, follow: NEXT, confidence: float, others: list[ScriptedSession]):
        self._follow, self._confidence, self._others = follow, confidence, others
        self.text, self.calls = "", []
        others.append(self)

    def read(self, ids: Sequence[int]) -> None:
        self.calls.append((True, text_of(ids)))
        self.text += text_of(ids)

    def fork(self) -> ScriptedSession:
        other = ScriptedSession(self._follow, self._confidence, self._others)
        other.text, other.calls = self.text, list(self.calls)
        return other

    def feed(self, ids: Sequence[int]) -> Tensor:
        self.calls.append((False, text_of(ids)))
        logits = torch.zeros(len(ids), VOCABULARY)
        for row, token in enumerate(ids):
            self.text += chr(token)
            logits[row, ord(self._follow(self.text))] = self._confidence
        return logits


class ScriptedSubject:
    """Implements `evaluation.subject.Subject` without a model. `follows` are by method, with "" for all others."""

    name = "scripted"
    begin = (1,)
    stop_tokens = frozenset({0})
    vocabulary = VOCABULARY

    def __init__(self, follows: dict[str, NEXT], context: int | None = 100_000, confidence: float = 5.0):
        self._follows, self.context, self._confidence = follows, context, confidence
        self.sessions: list[ScriptedSession] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return text_of(ids)

    def open(self, method) -> ScriptedSession:
        return ScriptedSession(self._follows.get(method.name, self._follows[""]), self._confidence, self.sessions)

    def feed_together(self, sessions, ids: Sequence[Sequence[int]], *, last: bool = False) -> Tensor:
        assert len({len(row) for row in ids}) == 1
        logits = torch.stack([session.feed(row) for session, row in zip(sessions, ids, strict=True)])
        return logits[:, -1:] if last else logits

    def head_errors(self, method, ids: Sequence[int], skip: int) -> list[list[float]]:
        return [[0.1, 0.2], [0.3, 0.4]]


def text_of(ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in ids)


def no_progress(done: int, total: int) -> None:
    assert 0 <= done < total


def parts_in_memory(*methods: str) -> Parts:
    return Parts({method: Part(None, {}) for method in methods})


def run_alone(task, subject, method):
    """The result of a task for one method."""
    return task.run(subject, [method], parts_in_memory(method.name), no_progress)[0]
