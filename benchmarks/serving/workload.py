"""Requests of a benchmark: random token ids, lengths and arrivals, the same for every contender."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """requests: how many. prompt, output: least and most tokens. rate: a second, as a Poisson process; None: all at
    the beginning. vocabulary: ids are below it."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    rate: float | None
    vocabulary: int
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """arrival: seconds after the beginning. output: tokens to generate, no fewer."""

    name: str
    prompt: tuple[int, ...]
    output: int
    arrival: float


def requests_of(workload: Workload) -> list[Request]:
    """In order of arrival."""
    draw = random.Random(workload.seed)
    made, arrival = [], 0.0
    for number in range(workload.requests):
        length, output = draw.randint(*workload.prompt), draw.randint(*workload.output)
        prompt = tuple(draw.randrange(10, workload.vocabulary) for _ in range(length))
        made.append(Request(f"request-{number}", prompt, output, arrival))
        arrival += draw.expovariate(workload.rate) if workload.rate else 0.0
    return made
