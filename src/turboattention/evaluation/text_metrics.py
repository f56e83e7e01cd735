"""Perplexity, bits per byte, and KL and top-1 agreement with the model's own cache, by position.

Each passage goes twice through the model in the same pieces, over its own cache and over a method's, and every
token's logits are compared. Intervals are bootstrapped over stretches of `STRETCH` tokens; what is relative to the
own cache is compared token by token first, so that the text's own difficulty cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .baselines import METHODS, CacheMethod
from .intervals import bootstrap
from .subject import PIECE, Progress, Subject

STRETCH = 128
BINS = 16
KEPT_BYTES = 2**30
"""The own cache's log-probabilities are kept for the next method up to this size in all, else computed again."""


class TextTask:
    """`limit` passages of `context` tokens, spread evenly over a text.

    Args:
        text: UTF-8 text; `source` names it in results.
        context: tokens of a passage; a shorter text is one passage.
    """

    name = "perplexity"

    def __init__(self, text: str, source: str, context: int, limit: int):
        self._text, self._source, self._context, self._limit = text, source, context, limit
        self._own: dict[int, Tensor] = {}
        self._kept = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"text": self._source, "context": self._context, "passages": self._limit, "piece": PIECE}

    def run(self, subject: Subject, method: CacheMethod, progress: Progress) -> dict[str, Any]:
        """Metrics, and `by_position`.

        Raises:
            InputError: the text has no two tokens.
        """
        passages = cut(subject.encode(self._text.replace("\f", "\n")), self._context, self._limit)
        columns, bits = [], []
        for index, ids in enumerate(passages):
            progress(index, len(passages))
            column, size = self._compare(subject, method, index, [*subject.begin, *ids])
            columns.append(column)
            bits.append(size)
        return {"bits_per_element": float(np.mean(bits))} | summarize(columns)

    def _compare(
        self, subject: Subject, method: CacheMethod, index: int, ids: list[int]
    ) -> tuple[dict[str, np.ndarray], float]:
        own = self._own_log_probs(subject, index, ids)
        session = subject.open(method)
        got = session.feed(ids[:-1]).log_softmax(-1)
        column = compare(own, got, torch.tensor(ids[1:]))
        # As many bytes as the predicted tokens stand for; the first of all is given.
        pieces = [subject.decode(ids[1:][at : at + STRETCH]) for at in range(0, len(ids) - 1, STRETCH)]
        column["bytes"] = np.array([len(piece.encode()) for piece in pieces], dtype=np.float64)
        return column, session.bits_per_element

    def _own_log_probs(self, subject: Subject, index: int, ids: Sequence[int]) -> Tensor:
        if index not in self._own:
            made = subject.open(METHODS["fp16"]).feed(ids[:-1]).log_softmax(-1)
            if self._kept + made.nbytes > KEPT_BYTES:
                return made
            self._own[index] = made
            self._kept += made.nbytes
        return self._own[index]


def cut(ids: Sequence[int], context: int, limit: int) -> list[list[int]]:
    """At most `limit` passages of `context` tokens, apart from each other, spread evenly."""
    if len(ids) < 2:
        raise InputError(f"text: expected at least two tokens, got {len(ids)}")
    whole = max(1, len(ids) // context)
    chosen = [index * whole // min(limit, whole) for index in range(min(limit, whole))]
    return [list(ids[at * context : (at + 1) * context]) for at in chosen]


def compare(own: Tensor, got: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """By token: negative log-likelihoods in nats, KL(own || got) in nats, and whether the likeliest is the same.

    Args:
        own, got: log-probabilities float32 [L, V]. targets: int64 [L], the tokens that followed.
    """
    likelihoods = [-x.gather(1, targets[:, None])[:, 0] for x in (own, got)]
    # KL is never negative; float32 sums come out slightly below 0 where the two are equal.
    kl = (own.exp() * (own - got)).sum(1).clamp_min(0)
    same = (own.argmax(1) == got.argmax(1)).float()
    values = {"own_nll": likelihoods[0], "nll": likelihoods[1], "kl": kl, "same": same}
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def summarize(passages: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Metrics with intervals, and means by position, over what `compare` gave for each passage."""
    names = ("own_nll", "nll", "kl", "same")
    sums = {name: np.concatenate([_by_stretch(p[name]) for p in passages]) for name in names}
    count = np.concatenate([_by_stretch(np.ones_like(p["nll"])) for p in passages])
    size = np.concatenate([p["bytes"] for p in passages])
    metrics = {
        "perplexity": bootstrap([sums["nll"], count], lambda s: np.exp(s[0] / s[1])),
        "perplexity_change": bootstrap([sums["nll"] - sums["own_nll"], count], lambda s: np.expm1(s[0] / s[1])),
        "bits_per_byte": bootstrap([sums["nll"], size], lambda s: s[0] / s[1] / math.log(2)),
        "kl": bootstrap([sums["kl"], count], lambda s: s[0] / s[1]),
        "top1": bootstrap([sums["same"], count], lambda s: s[0] / s[1]),
    }
    return {"metrics": metrics, "tokens": int(count.sum()), "by_position": _by_position(passages)}


def _by_stretch(values: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), STRETCH))


def _by_position(passages: Sequence[dict[str, np.ndarray]]) -> dict[str, list[float]]:
    """Means over equal ranges of positions; a position is the number of tokens before the predicted one."""
    longest = max(len(p["nll"]) for p in passages)
    edges = np.unique(np.linspace(0, longest, min(BINS, longest) + 1).astype(int))
    rows: dict[str, list[float]] = {"position": [], "kl": [], "top1": []}
    for low, high in itertools.pairwise(edges):
        rows["position"].append(float(low + high) / 2)
        for name, column in (("kl", "kl"), ("top1", "same")):
            rows[name].append(float(np.concatenate([p[column][low:high] for p in passages]).mean()))
    return rows
