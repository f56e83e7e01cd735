"""Requests of a benchmark: prompts, lengths and arrivals, the same for every cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """requests: their number. prompt, output: minimum and maximum of tokens. rate: per second, as a Poisson process;
    None: all at the start. alone: each is sent when the previous one has finished. vocabulary: random ids are below it;
    None: prompts are pieces of the bundled document."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    rate: float | None
    vocabulary: int | None
    alone: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """arrival: seconds after the beginning. output: tokens to generate, no fewer."""

    name: str
    prompt: tuple[int, ...]
    output: int
    arrival: float


def requests_of(workload: Workload, ids: Sequence[int] = ()) -> list[Request]:
    """In order of arrival. ids: the document, where prompts are pieces of it."""
    draw = random.Random(workload.seed)
    made, arrival = [], 0.0
    for number in range(workload.requests):
        length, output = draw.randint(*workload.prompt), draw.randint(*workload.output)
        prompt = _prompt(draw, length, workload.vocabulary, ids)
        made.append(Request(f"request-{number}", prompt, output, arrival))
        arrival += draw.expovariate(workload.rate) if workload.rate else 0.0
    return made


def _prompt(draw: random.Random, length: int, vocabulary: int | None, ids: Sequence[int]) -> tuple[int, ...]:
    if vocabulary is not None:
        return tuple(draw.randrange(10, vocabulary) for _ in range(length))
    start = draw.randrange(len(ids) - length)
    return tuple(ids[start : start + length])
