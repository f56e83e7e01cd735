"""The results of a soak: answers compared with solo answers, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WARM_UP = 0.25
"""The fraction of the samples after which memory must not grow."""


@dataclass(frozen=True)
class Answers:
    """equal: answers that equal their solo answers, of aborted requests up to the abort. close: others whose two
    largest logits are close at the first difference. wrong: the rest. widest: the largest gap among the close ones."""

    equal: int
    close: int
    wrong: tuple[str, ...]
    widest: float


def compare(
    got: Mapping[str, Sequence[int]],
    solo: Mapping[str, Sequence[int]],
    gaps: Mapping[str, Sequence[float]],
    aborted: Sequence[str],
    bound: float,
) -> Answers:
    """gaps: largest logit minus the second, by request and position of `solo`. bound: the largest gap that is close."""
    equal, close, wrong = 0, [], []
    taken_back = set(aborted)
    for name, wanted in solo.items():
        came = got.get(name, ())
        part = next((at for at, (a, b) in enumerate(zip(came, wanted, strict=False)) if a != b), None)
        whole = len(came) == len(wanted) or (name in taken_back and len(came) < len(wanted))
        if part is None and whole:
            equal += 1
        elif part is not None and whole and gaps[name][part] < bound:
            close.append(gaps[name][part])
        else:
            wrong.append(name)
    return Answers(equal, len(close), tuple(wrong), max(close, default=0.0))


@dataclass(frozen=True)
class Memory:
    """Bytes: the mean of the first and of the last third after the warm-up, and the maximum."""

    early: float
    late: float
    most: int

    @property
    def growth(self) -> float:
        return self.late / self.early - 1


def memory_of(samples: Sequence[int]) -> Memory:
    """Raises ValueError for fewer than 8 samples."""
    if len(samples) < 8:
        raise ValueError(f"samples: expected 8 or more, got {len(samples)}")
    warm = samples[round(len(samples) * WARM_UP) :]
    third = len(warm) // 3
    return Memory(sum(warm[:third]) / third, sum(warm[-third:]) / third, max(samples))
