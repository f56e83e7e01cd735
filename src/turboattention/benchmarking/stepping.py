"""TurboAttention as a decode step, for peers whose call cannot attend without storing a token."""

from __future__ import annotations

import time

from torch import Tensor

from ..api import turbo_attention_with_kvcache
from ..kv.cache import KVCache
from .contenders import INTEGER_BOUND, Contender
from .gate import expect
from .problem import Problem, fill
from .storing import Growing
from .timing import Measured

STORES = "one token stored per call"
"""Note on a comparison in which both sides are such steps."""

_GROWTH = 8
"""Blocks that the cache grows by before it is replaced by a copy of its first state, outside of any measurement."""


class Step(Measured):
    """One token stored and attended. A sample has whole blocks of tokens, so its time includes compression."""

    def __init__(self, problem: Problem, backend: str):
        assert problem.cache is not None
        config = problem.cache.config
        self._q, self._backend, self._block = problem.q, backend, config.block_size
        self.least = self._block
        self._new = problem.k[:, :, -1:], problem.v[:, :, -1:]
        self._start = fill(problem.k[:, :, :-1], problem.v[:, :, :-1], config)
        self._growing = Growing(self._start, limit=len(self._start) + _GROWTH * self._block + 1)

    def __call__(self) -> Tensor:
        """The first step over a fresh copy: all tokens of the problem."""
        return self._step(self._start.clone())

    def seconds(self, count: int) -> float:
        cache = self._growing.cache()
        steps = -(-count // self._block) * self._block
        begun = time.perf_counter()
        for _ in range(steps):
            self._step(cache)
        return (time.perf_counter() - begun) / steps * count

    def stored(self) -> KVCache:
        """A cache as the first step leaves it."""
        cache = self._start.clone()
        self._step(cache)
        return cache

    def _step(self, cache: KVCache) -> Tensor:
        return turbo_attention_with_kvcache(self._q, cache, *self._new, backend=self._backend)


def step(problem: Problem, backend: str) -> Contender:
    call = Step(problem, backend)
    expected = expect(problem.q, *call.stored().dequantize(), False)
    return Contender("turboattention step", call, expected, INTEGER_BOUND)
