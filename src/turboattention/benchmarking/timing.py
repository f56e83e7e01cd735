"""Two contenders timed in turns, A B A B, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds a pair of contenders gets, seconds a sample lasts at least, and how many pairs."""

    seconds: float = 3.0
    sample: float = 0.02
    least: int = 5
    most: int = 200


QUICK = Effort(seconds=0.3, sample=0.002, least=3, most=50)

_PAUSE = 0.005
"""Seconds between two contenders. OpenMP threads spin for a while after their work, and would take
processor time from a contender that has a pool of its own."""

_SHORT = 0.02
"""Calls shorter than this run once untimed at the start of a sample: the contender before has
emptied the caches and put the threads to sleep."""


@dataclass(frozen=True)
class Pairs:
    """Seconds a call, of A and of B, one entry a turn."""

    a: list[float]
    b: list[float]


def alternate(a: Call, b: Call, effort: Effort, clock: Clock = time.perf_counter, pause: float = _PAUSE) -> Pairs:
    """Times A and B in turns until the time is up; each sample is the mean of as many calls as fill it."""
    counts = [_warm_up(call, effort, clock) for call in (a, b)]
    pairs = Pairs([], [])
    start = clock()
    while len(pairs.a) < effort.least or (len(pairs.a) < effort.most and clock() - start < effort.seconds):
        for call, (count, short), samples in zip((a, b), counts, (pairs.a, pairs.b), strict=True):
            time.sleep(pause)
            if short:
                call()
            begun = clock()
            for _ in range(count):
                call()
            samples.append((clock() - begun) / count)
    return pairs


def _warm_up(call: Call, effort: Effort, clock: Clock) -> tuple[int, bool]:
    """Calls a sample takes, and whether they are short."""
    call()
    begun = clock()
    call()
    seconds = max(clock() - begun, 1e-9)
    return max(1, min(round(effort.sample / seconds), 10_000)), seconds < _SHORT


def fastest(calls: dict[str, Call], rounds: int = 3, clock: Clock = time.perf_counter) -> str:
    """The name of the quickest of several ways to the same result: each one's best of some rounds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begun = clock()
            call()
            best[name] = min(best[name], clock() - begun)
    return min(best, key=lambda name: best[name])
