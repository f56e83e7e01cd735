"""The relative error of attention by layer and query head, over one passage of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .baselines import CacheMethod
from .records import Parts
from .subject import PIECE, Progress, Subject
from .text_metrics import cut


class HeadTask:
    """The first `context` tokens of a text; errors are measured on the second half, with the first in the cache."""

    name = "heads"

    def __init__(self, text: str, source: str, context: int):
        self._text, self._source, self._context = text, source, context

    @property
    def settings(self) -> dict[str, Any]:
        return {"text": self._source, "context": self._context, "piece": PIECE}

    def together(self, subject: Subject) -> int:
        return 1

    def run(
        self, subject: Subject, methods: Sequence[CacheMethod], parts: Parts, progress: Progress
    ) -> list[dict[str, Any]]:
        progress(0, 1)
        return [self._errors(subject, method) for method in methods]

    def _errors(self, subject: Subject, method: CacheMethod) -> dict[str, Any]:
        ids = cut(subject.encode(self._text.replace("\f", "\n")), self._context, 1)[0]
        errors = subject.head_errors(method, [*subject.begin, *ids], len(ids) // 2)
        mean, worst = float(np.mean(errors)), float(np.max(errors))
        return {"metrics": {"mean_error": {"value": mean}, "worst_error": {"value": worst}}, "errors": errors}
