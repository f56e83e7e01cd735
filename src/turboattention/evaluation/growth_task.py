"""Growth of errors over text that the model generates from a short prompt.

The text is sampled over the model's own cache and then evaluated like any other text. Its first tokens are read with
an almost empty cache, its last ones with all of the generated text in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .baselines import METHODS
from .intervals import bootstrap
from .subject import Subject
from .text_metrics import STRETCH, Columns, TextTask, cut

PROMPT = 64
TEMPERATURE = 0.8
SEED = 30_000_000


class GrowthTask(TextTask):
    """`limit` texts of `context` tokens, each after a prompt of `PROMPT` tokens from the given text."""

    name = "growth"

    def __init__(self, text: str, source: str, context: int, limit: int, piece: int):
        super().__init__(text, source, context, limit, piece)
        self._written: list[list[int]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"prompt": PROMPT, "temperature": TEMPERATURE, "seed": SEED}

    def _passages(self, subject: Subject) -> list[list[int]]:
        if not self._written:
            prompts = cut(subject.encode(self._text.replace("\f", "\n")), PROMPT, self._limit)
            self._written = [
                write(subject, [*subject.begin, *ids], self._context, SEED + index) for index, ids in enumerate(prompts)
            ]
        return self._written

    def _summary(self, measured: Sequence[tuple[Columns, float]]) -> dict[str, Any]:
        """KL, then KL over the first and the last quarter, then the other metrics of a text."""
        result, quarter = super()._summary(measured), self._context // 4
        metrics = {"kl": result["metrics"]["kl"]}
        for name, where in (("kl_first", slice(None, quarter)), ("kl_last", slice(-quarter, None))):
            kls = [columns["kl"][where] for columns, _ in measured]
            stretches = [part for kl in kls for part in np.array_split(kl, max(1, len(kl) // STRETCH))]
            sums = [[part.sum() for part in stretches], [len(part) for part in stretches]]
            metrics[name] = bootstrap(sums, lambda s: s[0] / s[1])
        return result | {"metrics": metrics | result["metrics"]}


def write(subject: Subject, prompt: list[int], length: int, seed: int) -> list[int]:
    """The prompt and the model's continuation, `length` tokens in total, sampled at `TEMPERATURE`.

    A stop token is replaced by the most likely other token, so that the text has the full length.
    """
    session, generator = subject.open(METHODS["fp16"]), torch.Generator().manual_seed(seed)
    logits, ids = session.feed(prompt)[-1], list(prompt)
    while True:
        logits[list(subject.stop_tokens)] = float("-inf")
        ids.append(int(torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)))
        if len(ids) >= length:
            return ids
        logits = session.feed(ids[-1:])[-1]
