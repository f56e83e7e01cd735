"""The soak's requests: pieces of a text, of random length, some with a shared prefix, some aborted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_PREFIXES = 6
_SHARED, _ABORTED, _AT_EDGE = 0.4, 0.15, 0.4
_BLOCK = 64
_PROMPT, _PREFIX, _OUTPUT, _STEPS = (10, 600), (64, 480), (1, 64), (1, 80)


@dataclass(frozen=True)
class Request:
    """prompt: token ids. output: tokens to generate. abort_after: the engine's steps after which it is aborted, if it
    is not finished; None: never. shared: whether its prompt begins with a shared prefix."""

    name: str
    prompt: tuple[int, ...]
    output: int
    abort_after: int | None
    shared: bool


def requests_of(count: int, ids: Sequence[int], seed: int = 0) -> list[Request]:
    """`count` requests out of `ids`, a text of at least 1,200 tokens."""
    draw = random.Random(seed)
    prefixes = [_piece(draw, ids, *_PREFIX) for _ in range(_PREFIXES)]
    return [_request(draw, number, ids, prefixes) for number in range(count)]


def _request(draw: random.Random, number: int, ids: Sequence[int], prefixes: Sequence[tuple[int, ...]]) -> Request:
    shared = draw.random() < _SHARED
    prompt = draw.choice(prefixes) if shared else ()
    prompt = (prompt + _piece(draw, ids, *_PROMPT))[: _PROMPT[1]]
    if draw.random() < _AT_EDGE and len(prompt) > 2 * _BLOCK:
        # About to fill a block, or just done: the next tokens need another one, when there may be none left.
        prompt = prompt[: len(prompt) // _BLOCK * _BLOCK + draw.randint(-2, 1)]
    abort = draw.randint(*_STEPS) if draw.random() < _ABORTED else None
    return Request(f"request-{number}", prompt, draw.randint(*_OUTPUT), abort, shared)


def _piece(draw: random.Random, ids: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    length = draw.randint(least, most)
    start = draw.randrange(len(ids) - length)
    return tuple(ids[start : start + length])
