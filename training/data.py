"""Training batches: passages of books and generated tasks, packed to one length."""

from __future__ import annotations

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

# How a generated document is drawn. Copying is what induction heads learn from first.
TASK_SHARE = {"recall": 0.35, "needle": 0.15, "copy": 0.35, "arithmetic": 0.15}

SHORTEST = 192  # tokens: the smallest budget that holds one question of every task


class Mixture:
    """Draws `batch(size, length)` of tokens, targets and weights, from a seed."""

    def __init__(self, books: Path, tokenizer: Tokenizer, task_fraction: float, seed: int = 0):
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
            # Half the rows are one long document, the others several shorter ones.
            room = length - len(tokens)
            budget = room if self.random.random() < 0.5 else self.random.randint(0, room)
            self._episode(max(SHORTEST, budget), tokens, weights)
        return np.array(tokens[:length]), np.array(weights[:length], np.float32)

    def _episode(self, budget: int, tokens: list[int], weights: list[float]) -> None:
        (task,) = self.random.choices(list(TASK_SHARE), list(TASK_SHARE.values()))
        self.episode_seed += 1
        # About half of a row of look-ups or copies is answers: that is where induction is learned.
        questions = {
            "recall": budget // 20,
            "needle": min(4, budget // 160),
            "copy": budget // 40,
            "arithmetic": budget // 80,
        }
        episode = tasks.generate(
            task,
            self.episode_seed,
            budget,
            measure=self._measure,
            questions=max(1, questions[task]),
            prose=self._passage(),
        )
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
