"""Statistics with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


def bootstrap(columns: Sequence[Any], of: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> dict[str, float]:
    """A statistic of sums over independent pieces, with its percentile bootstrap interval.

    Args:
        columns: numbers [quantities, pieces].
        of: from sums [quantities, n] to statistics [n]; n is 1 for the value itself.

    Returns:
        {"value", "low", "high"}. With a single piece, low and high equal the value.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    data = np.asarray(columns, dtype=np.float64)
    pieces = data.shape[1]
    value = float(of(data.sum(1, keepdims=True))[0])
    drawn = np.random.default_rng(seed).multinomial(pieces, np.full(pieces, 1 / pieces), size=RESAMPLES)
    spread = of(data @ drawn.T)
    low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def share(right: int, total: int) -> dict[str, Any]:
    """A proportion of successes with its Wilson interval, which has a width at 0 and 1 too.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA, 1927).
    """
    if total == 0:
        return {"value": None, "low": None, "high": None}
    z, p = 1.959963984540054, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At 0 and 1 the formula is exact except for rounding.
    low, high = (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)
    return {"value": p, "low": low, "high": high}


def mcnemar(one: Sequence[int], other: Sequence[int]) -> dict[str, Any]:
    """Two methods on the same questions: how many only one answers, and the exact two-sided p of McNemar's test.

    Args:
        one, other: 1 for each correctly answered question, else 0.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions (1947), with the
    binomial distribution instead of its approximation.
    """
    pairs = list(zip(one, other, strict=True))
    only_one, only_other = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    differing = only_one + only_other
    tail = sum(math.comb(differing, k) for k in range(min(only_one, only_other) + 1)) / 2**differing
    return {"one": only_one, "other": only_other, "p": min(1.0, 2 * tail)}
