"""Perplexity, bits per byte, and KL, total variation and top-1 agreement with the model's own cache, by position.

A passage is run through the model piece by piece, over its own cache and the caches of several methods at once. The
logits of a piece are compared and discarded, so that only one piece's are in memory. Intervals are bootstrapped over
stretches of `STRETCH` tokens; metrics relative to the own cache are computed per token, so that the difficulty of the
text cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .baselines import METHODS, CacheMethod
from .intervals import bootstrap
from .records import Parts
from .subject import PIECE, Progress, Subject

STRETCH = 128
BINS = 16
LOGIT_BYTES = 2**29
"""Upper bound for the logits of one piece, over all methods of a forward pass."""
MOST_TOGETHER = 12
"""The largest number of methods in one forward pass, each of which has a cache."""
COLUMNS = ("own_nll", "nll", "kl", "tvd", "same")
Columns = dict[str, np.ndarray]


class TextTask:
    """`limit` passages of `context` tokens, spread evenly over a text.

    Args:
        text: UTF-8 text; `source` names it in results.
        context: tokens of a passage; a shorter text is one passage.
        piece: tokens fed at once.
    """

    name = "perplexity"

    def __init__(self, text: str, source: str, context: int, limit: int, piece: int = PIECE):
        self._text, self._source, self._context, self._limit = text, source, context, limit
        self._piece = piece

    @property
    def settings(self) -> dict[str, Any]:
        return {"text": self._source, "context": self._context, "passages": self._limit, "piece": self._piece}

    def together(self, subject: Subject) -> int:
        """The number of methods whose logits for one piece fit into `LOGIT_BYTES`, with those of the own cache."""
        rows = LOGIT_BYTES // (4 * self._piece * subject.vocabulary)
        return min(max(rows - 1, 1), MOST_TOGETHER)

    def run(
        self, subject: Subject, methods: Sequence[CacheMethod], parts: Parts, progress: Progress
    ) -> list[dict[str, Any]]:
        """Metrics, and `by_position`.

        Raises:
            InputError: the text has fewer than two tokens.
        """
        passages = self._passages(subject)
        measured: dict[str, list[tuple[Columns, float]]] = {method.name: [] for method in methods}
        for index, ids in enumerate(passages):
            key = str(index)
            missing = [method for method in methods if parts.get(method.name, key) is None]
            if missing:
                steps = _Steps(progress, index, len(passages))
                for method, found in zip(missing, self._compare(subject, missing, ids, steps), strict=True):
                    parts.put(method.name, key, found)
            for method in methods:
                found = parts.get(method.name, key)
                columns = {name: np.array(values) for name, values in found["columns"].items()}
                measured[method.name].append((columns, found["bits"]))
        return [self._summary(measured[method.name]) for method in methods]

    def _passages(self, subject: Subject) -> list[list[int]]:
        passages = cut(subject.encode(self._text.replace("\f", "\n")), self._context, self._limit)
        return [[*subject.begin, *ids] for ids in passages]

    def _summary(self, measured: Sequence[tuple[Columns, float]]) -> dict[str, Any]:
        return {"bits_per_element": float(np.mean([bits for _, bits in measured]))} | summarize(
            [c for c, _ in measured]
        )

    def _compare(
        self, subject: Subject, methods: Sequence[CacheMethod], ids: Sequence[int], progress: _Steps
    ) -> Iterator[dict[str, Any]]:
        """JSON per method: columns with one value per token, and bits per element over the last stretch."""
        others = [method for method in methods if method.name != "fp16"]
        own, sessions = subject.open(METHODS["fp16"]), [subject.open(method) for method in others]
        pieces: dict[str, list[Columns]] = {method.name: [] for method in methods}
        sizes: dict[str, list[float]] = {method.name: [] for method in methods}
        for at in range(0, len(ids) - 1, self._piece):
            progress(at, len(ids))
            end = min(at + self._piece, len(ids) - 1)
            logits = subject.feed_together([own, *sessions], [ids[at:end]] * (1 + len(sessions)))
            targets, expected = torch.tensor(ids[at + 1 : end + 1]), logits[0].log_softmax(-1)
            for method in methods:
                row = 0 if method.name == "fp16" else 1 + others.index(method)
                got = logits[row].log_softmax(-1) if row else expected
                pieces[method.name].append(compare(expected, got, targets))
                if end > len(ids) - 1 - STRETCH:
                    sizes[method.name].append((sessions[row - 1] if row else own).bits_per_element)
        # The bytes of the predicted tokens, which are all but the first.
        texts = [subject.decode(ids[1:][at : at + STRETCH]) for at in range(0, len(ids) - 1, STRETCH)]
        size = [len(text.encode()) for text in texts]
        for method in methods:
            columns = {name: np.concatenate([p[name] for p in pieces[method.name]]) for name in COLUMNS}
            short = {name: [float(f"{x:.6g}") for x in values] for name, values in columns.items()}
            yield {"bits": float(np.mean(sizes[method.name])), "columns": short | {"bytes": size}}


class _Steps:
    """Progress over pieces of passages."""

    def __init__(self, progress: Progress, index: int, passages: int):
        self._progress, self._index, self._passages = progress, index, passages

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._index * total + done, self._passages * total)


def cut(ids: Sequence[int], context: int, limit: int) -> list[list[int]]:
    """At most `limit` passages of `context` tokens that do not overlap, spread evenly over the text."""
    if len(ids) < 2:
        raise InputError(f"--text: expected at least two tokens, got {len(ids)}")
    whole = max(1, len(ids) // context)
    chosen = [index * whole // min(limit, whole) for index in range(min(limit, whole))]
    return [list(ids[at * context : (at + 1) * context]) for at in chosen]


def compare(own: Tensor, got: Tensor, targets: Tensor) -> Columns:
    """Per token: negative log-likelihoods and KL(own || got) in nats, the total variation distance (half the sum of
    absolute differences of probabilities), and whether both rank the same token first.

    Args:
        own, got: log-probabilities float32 [L, V]. targets: int64 [L], the tokens that follow.
    """
    likelihoods = [-x.gather(1, targets[:, None])[:, 0] for x in (own, got)]
    odds = own.exp()
    # KL is not negative; the float32 sum of equal distributions can be slightly below 0.
    kl = (odds * (own - got)).sum(1).clamp_min(0)
    tvd = (odds - got.exp()).abs().sum(1) / 2
    same = (own.argmax(1) == got.argmax(1)).float()
    values = {"own_nll": likelihoods[0], "nll": likelihoods[1], "kl": kl, "tvd": tvd, "same": same}
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def summarize(passages: Sequence[Columns]) -> dict[str, Any]:
    """Metrics with intervals, and means by position, from the columns of `compare` for each passage."""
    sums = {name: np.concatenate([_by_stretch(p[name]) for p in passages]) for name in COLUMNS}
    count = np.concatenate([_by_stretch(np.ones_like(p["nll"])) for p in passages])
    size = np.concatenate([p["bytes"] for p in passages])
    metrics = {
        "perplexity": bootstrap([sums["nll"], count], lambda s: np.exp(s[0] / s[1])),
        "perplexity_change": bootstrap([sums["nll"] - sums["own_nll"], count], lambda s: np.expm1(s[0] / s[1])),
        "bits_per_byte": bootstrap([sums["nll"], size], lambda s: s[0] / s[1] / math.log(2)),
        "kl": bootstrap([sums["kl"], count], lambda s: s[0] / s[1]),
        "overlap": bootstrap([sums["tvd"], count], lambda s: 1 - s[0] / s[1]),
        "top1": bootstrap([sums["same"], count], lambda s: s[0] / s[1]),
    }
    return {"metrics": metrics, "tokens": int(count.sum()), "by_position": _by_position(passages)}


def _by_stretch(values: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), STRETCH))


def _by_position(passages: Sequence[Columns]) -> dict[str, list[float]]:
    """Means over equal ranges of positions; a position is the number of tokens before the predicted one."""
    longest = max(len(p["nll"]) for p in passages)
    edges = np.unique(np.linspace(0, longest, min(BINS, longest) + 1).astype(int))
    rows: dict[str, list[float]] = {"position": [], "kl": [], "top1": []}
    for low, high in itertools.pairwise(edges):
        rows["position"].append(float(low + high) / 2)
        for name, column in (("kl", "kl"), ("top1", "same")):
            rows[name].append(float(np.concatenate([p[column][low:high] for p in passages]).mean()))
    return rows
