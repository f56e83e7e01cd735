"""A contender: the call to time, its expected result, and the error bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import turbo_attention, turbo_attention_with_kvcache
from ..config import TurboConfig
from .gate import Expected, check
from .problem import Problem

INTEGER_BOUND = 0.05
"""Relative error of INT8 queries and weights against exact attention over the same stored keys and values."""


@dataclass(frozen=True)
class Contender:
    """`output` converts the result of `call` to [B, Hq, Lq, D]; it is not timed. `detail`: the variant that ran."""

    name: str
    call: Callable[[], Any]
    expected: Expected
    bound: float
    detail: str = ""
    output: Callable[[Any], Tensor] = lambda result: result

    def check(self) -> float:
        """The relative error. Raises WrongResultError if it is beyond the bound."""
        with torch.no_grad():
            return check(self.name, self.output(self.call()), self.expected, self.bound)


def turbo(problem: Problem, backend: str, config: TurboConfig, name: str = "turboattention") -> Contender:
    """TurboAttention: over the problem's cache if it has one, else over its tensors.

    The cache already contains all tokens; storing new tokens is measured separately.
    """
    if problem.cache is None:
        return Contender(
            name,
            lambda: turbo_attention(
                problem.q, problem.k, problem.v, is_causal=problem.shape.causal, config=config, backend=backend
            ),
            problem.expected,
            INTEGER_BOUND,
        )
    cache = problem.cache
    return Contender(
        name,
        lambda: turbo_attention_with_kvcache(
            problem.q, cache, is_causal=problem.shape.causal or problem.shape.queries == 1, backend=backend
        ),
        problem.expected_stored,
        INTEGER_BOUND,
    )
