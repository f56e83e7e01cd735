"""What a soak has shown: answers beside solo answers, and memory as it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WARM_UP = 0.25
"""The part of the samples after which memory has to be flat."""


@dataclass(frozen=True)
class Answers:
    """equal: answers that are their solo answers, of requests taken back as far as they came. close: others, whose
    two best logits are close where they part. wrong: the rest. widest: the widest gap among the close ones."""

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
    """gaps: best logit less the second, by request and position of `solo`. bound: what counts as close."""
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
    """Bytes: the mean of the first and of the last third of what follows the warm-up, and the most there was."""

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
