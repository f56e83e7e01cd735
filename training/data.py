"""Training batches: passages of books and generated tasks, packed to one length."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from turboattention.evaluation import tasks

# Random keys, values and words cannot be predicted; they are trained on only so far that the
# model knows their form. Answers can, and carry the full weight.
CONTEXT_WEIGHT = 0.1

# How a generated document is drawn.
TASK_SHARE = {"recall": 0.3, "needle": 0.25, "copy": 0.25, "arithmetic": 0.2}

# The smallest budgets in tokens. Looking up and copying are learned from tables of a few lines,
# where a guess is right often enough to show the way; in long ones they are not found at all.
SHORTEST = {"recall": 70, "needle": 192, "copy": 128, "arithmetic": 192}


class Mixture:
    """Draws `batch(size, length)` of tokens, targets and weights, from a seed."""

    def __init__(
        self,
        books: Path,
        tokenizer: Tokenizer,
        task_fraction: float,
        seed: int = 0,
        shares: dict[str, float] | None = None,
    ):
        self.shares = TASK_SHARE if shares is None else shares
        self.text = books.read_text(encoding="utf-8")
        self.tokenizer = tokenizer
        self.task_fraction = task_fraction
        self.random = random.Random(seed)
        self.episode_seed = 1_000_000 * (seed + 1)
        parts = [tokenizer.encode_batch_fast(book.split("\n")) for book in self.text.split("\f")]
        newline = tokenizer.encode("\n").ids
        self.books = np.array(
            [token for book in parts for line in book for token in (*line.ids, *newline)], dtype=np.uint16
        )

    def batch(self, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """int64 tokens [size, length], targets (shifted by one) and float32 weights."""
        rows = [self._row(length + 1) for _ in range(size)]
        tokens = torch.tensor(np.stack([row[0] for row in rows]))
        weights = torch.tensor(np.stack([row[1] for row in rows]))
        return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]

    def _row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        if self.random.random() >= self.task_fraction:
            at = self.random.randrange(len(self.books) - length)
            return self.books[at : at + length].astype(np.int64), np.ones(length, np.float32)
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            self._episode(length - len(tokens), tokens, weights)
        return np.array(tokens[:length]), np.array(weights[:length], np.float32)

    def _episode(self, room: int, tokens: list[int], weights: list[float]) -> None:
        """One document: as long as the room, or of any length up to it, in equal shares."""
        (task,) = self.random.choices(list(self.shares), list(self.shares.values()))
        shortest = SHORTEST[task]
        budget = max(shortest, room)
        if self.random.random() < 0.5:
            budget = int(math.exp(self.random.uniform(math.log(shortest), math.log(budget))))
        self.episode_seed += 1
        # About half of a table is asked back: that is where induction is learned.
        questions = {
            "recall": budget // 18,
            "needle": min(4, budget // 256),
            "copy": budget // 45,
            "arithmetic": budget // 80,
        }
        asked, prose = max(1, questions[task]), self._passage()
        try:
            episode = tasks.generate(
                task, self.episode_seed, budget, measure=self._measure, questions=asked, prose=prose
            )
        except ValueError:  # the first line drawn was longer than a small budget: draw again
            return
        tokens.append(0)
        weights.append(CONTEXT_WEIGHT)
        for text, is_answer in episode.spans:
            ids = self.tokenizer.encode(text).ids
            tokens += ids
            weights += [1.0 if is_answer else CONTEXT_WEIGHT] * len(ids)

    def _measure(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)

    def _passage(self) -> str:
        at = self.random.randrange(len(self.text) - 40_000)
        return self.text[at : at + 40_000].replace("\f", "\n")
