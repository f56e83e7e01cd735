"""Medians, percentiles, and ratios of alternately timed contenders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentiles of `count` samples."""

    median: float
    p20: float
    p80: float
    count: int


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile `share` of sorted values, with linear interpolation."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> Spread:
    return Spread(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8), len(values))


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Spread of `over[i] / under[i]`.

    Both halves of a pair are timed directly after each other, so that slower disturbances of the machine affect both
    and cancel.
    """
    if len(over) != len(under):
        raise ValueError(f"over: expected as many samples as under ({len(under)}), got {len(over)}")
    return spread([a / b for a, b in zip(over, under, strict=True)])


@dataclass(frozen=True)
class Line:
    """`seconds = base + slope * x`, and the largest relative deviation of a point from it."""

    base: float
    slope: float
    deviation: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares through at least two points with different `x`."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    width = sum((a - mean_x) ** 2 for a in x)
    if not width:
        raise ValueError("x: expected at least two different values")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / width
    base = mean_y - slope * mean_x
    return Line(base, slope, max(abs(b - base - slope * a) / b for a, b in zip(x, y, strict=True)))
