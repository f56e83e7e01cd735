"""Times two contenders alternately, A B A B, in one process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]


class Measured(ABC):
    """A call that measures itself: in another process, or with something before each sample that must not count.

    least: the calls that a sample must have, which the contender beside it then has as well.
    """

    least: int = 1

    @abstractmethod
    def __call__(self) -> Any: ...

    @abstractmethod
    def seconds(self, count: int) -> float:
        """Seconds that `count` calls take."""


@dataclass(frozen=True)
class Effort:
    """The time budget: seconds per pair of contenders, minimum seconds per sample, and the number of pairs."""

    seconds: float = 3.0
    sample: float = 0.02
    least: int = 5
    most: int = 200


QUICK = Effort(seconds=0.3, sample=0.002, least=3, most=50)

_PAUSE = 0.005
"""Seconds between two contenders. OpenMP threads spin for a while after their work, which takes processor time from a
contender with another thread pool."""

_SHORT = 0.02
"""Calls shorter than this run once untimed at the start of a sample, because the previous contender has evicted the
caches and the threads are asleep."""


@dataclass(frozen=True)
class Pairs:
    """Seconds per call of A and of B, one entry per turn."""

    a: list[float]
    b: list[float]


def alternate(a: Call, b: Call, effort: Effort, clock: Clock = time.perf_counter, pause: float = _PAUSE) -> Pairs:
    """Time A and B alternately until the time is up; each sample is the mean of the calls that fit into it."""
    least = max(call.least if isinstance(call, Measured) else 1 for call in (a, b))
    counts = [(max(count, least), short) for count, short in (_warm_up(call, effort, clock) for call in (a, b))]
    pairs = Pairs([], [])
    start = clock()
    while len(pairs.a) < effort.least or (len(pairs.a) < effort.most and clock() - start < effort.seconds):
        for call, (count, short), samples in zip((a, b), counts, (pairs.a, pairs.b), strict=True):
            time.sleep(pause)
            if short:
                _seconds(call, 1, clock)
            samples.append(_seconds(call, count, clock) / count)
    return pairs


def _seconds(call: Call, count: int, clock: Clock) -> float:
    if isinstance(call, Measured):
        return call.seconds(count)
    begun = clock()
    for _ in range(count):
        call()
    return clock() - begun


def _warm_up(call: Call, effort: Effort, clock: Clock) -> tuple[int, bool]:
    """The number of calls per sample, and whether they are short."""
    _seconds(call, 1, clock)
    seconds = max(_seconds(call, 1, clock), 1e-9)
    return max(1, min(round(effort.sample / seconds), 10_000)), seconds < _SHORT


def fastest(calls: dict[str, Call], rounds: int = 3, clock: Clock = time.perf_counter) -> str:
    """The name of the fastest of several variants with the same result, by their best of several rounds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begun = clock()
            call()
            best[name] = min(best[name], clock() - begun)
    return min(best, key=lambda name: best[name])
