"""The summary table: one row per method, with its size and the main metric of every task with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

NOTHING = "–"
TEXT = (
    ("perplexity", "perplexity", "{:.3f}", 1),
    ("perplexity change", "perplexity_change", "{:+.2f}", 100),
    ("bits / byte", "bits_per_byte", "{:.4f}", 1),
    ("KL, nats", "kl", "{:.5f}", 1),
    ("1 − TVD", "overlap", "{:.2f}", 100),
    ("top-1", "top1", "{:.2f}", 100),
)
"""Columns of a text: title, metric, form and scale."""


def find(document: dict[str, Any], method: str, task: str) -> dict[str, Any] | None:
    """The unit of a method and task, if it was measured."""
    for unit in document["units"]:
        if unit["method"] == method and unit["task"] == task and "failed" not in unit:
            return unit
    return None


def tasks(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(unit["task"] for unit in document["units"]))


def table(
    document: dict[str, Any], *, intervals: bool = True, called: str = "title"
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text. Cells have the interval in brackets on a second line; `called` selects the "title" or
    "name" of methods."""
    names = tasks(document)
    # Heads are shown in a figure instead of a column.
    others = [name for name in names if name not in ("perplexity", "heads")]
    columns = ["method", "bits / element"]
    columns += [title for title, *_ in TEXT] if "perplexity" in names else []
    columns += others
    rows = []
    for method in document["methods"]:
        units = [find(document, method["name"], task) for task in names]
        if any(units):
            rows.append([method[called], bits_text(bits(document, method["name"])), *_cells(units, names, intervals)])
    return columns, rows


def bits(document: dict[str, Any], method: str) -> float | None:
    """Bits per element at the end of the passages of perplexity; otherwise, of the first task that has them."""
    units = [find(document, method, task) for task in sorted(tasks(document), key=lambda name: name != "perplexity")]
    sizes = [unit["bits_per_element"] for unit in units if unit and unit.get("bits_per_element")]
    return sizes[0] if sizes else None


def chief(unit: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The main metric of a unit, which is its first."""
    return next(iter(unit["metrics"].items()), None)


def _cells(units: Sequence[dict[str, Any] | None], names: Sequence[str], intervals: bool) -> Iterator[str]:
    found = dict(zip(names, units, strict=True))
    if "perplexity" in found:
        unit = found.pop("perplexity")
        metrics = unit["metrics"] if unit else {}
        for _, name, form, scale in TEXT:
            yield figure(metrics.get(name), form, scale, intervals)
    found.pop("heads", None)
    for unit in found.values():
        first = chief(unit) if unit else None
        is_share = first is not None and first[0] != "kl" and 0 <= (first[1]["value"] or 0) <= 1
        yield figure(first[1] if first else None, "{:.1f}" if is_share else "{:.4f}", 100 if is_share else 1, intervals)


def figure(metric: dict[str, Any] | None, form: str, scale: float, interval: bool = True) -> str:
    """{"value": 0.5, "low": 0.25, "high": 0.75} as "50.0%", and "[25.0, 75.0]" below, where the scale is 100."""
    if metric is None or metric["value"] is None:
        return NOTHING
    unit = "%" if scale == 100 else ""
    text = form.format(metric["value"] * scale) + unit
    low, high = metric.get("low"), metric.get("high")
    if not interval or low is None or high is None or math.isnan(low) or low == high:
        return text
    return f"{text}\n[{form.format(low * scale)}, {form.format(high * scale)}]"


def bits_text(size: float | None) -> str:
    return NOTHING if size is None or not math.isfinite(size) else f"{size:.2f}"
