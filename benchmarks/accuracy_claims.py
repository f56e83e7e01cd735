"""Tables of results of texts and generated tasks: aims, baselines of the same size, context lengths. Tables are columns
and rows."""

from __future__ import annotations

from typing import Any

from turboattention.evaluation.intervals import bootstrap
from turboattention.evaluation.report import summary
from turboattention.evaluation.report.evaluation import LOSSES, loss_points

POINTS = 0.01
AIMS = (("turbo-4", 0.002), ("turbo-3", 0.005), ("turbo-calibrated", 0.005), ("turbo-2", 0.03))
"""Largest relative increase of perplexity. Except for the last, no task may lose more than one point."""
LOOSE = "turbo-2"
KL_AIMS = (("turbo-4-reordered", 4.3), ("turbo-3-reordered", 3.3), ("turbo-2-reordered", 2.3))
"""Methods, and the bits per element (all overhead included) at which the aims of `MOST_KL` apply."""
MOST_KL = {"qwen": (0.008, 0.02, 0.08), "smollm2": (0.006, 0.02, 0.08), "gemma3": (0.006, 0.02, 0.08)}
"""By real model, the largest KL for each of `KL_AIMS`."""
PERPLEXITY_AIMS = (("turbo-4-reordered", 0.005), ("turbo-3-reordered", 0.015))
NOT_SMALLER = "no configuration this small"
Table = tuple[list[str], list[list[str]]]


def aims(document: dict[str, Any]) -> Table:
    """Each aim, what was measured, and whether it is reached."""
    rows = []
    for name, most in AIMS:
        unit = summary.find(document, name, "perplexity")
        if unit is None:
            continue
        change = unit["metrics"]["perplexity_change"]
        what = f"{unit['title']}: perplexity within {most:.1%}"
        rows.append([what, summary.figure(change, "{:+.2f}", 100), verdict(change["low"], change["high"], most)])
        for task in ("recall", "needle", "copy", "arithmetic"):
            own, got = summary.find(document, "fp16", task), summary.find(document, name, task)
            if own and got and name != LOOSE:
                loss = lost(own, got)
                text = summary.figure(loss, "{:+.1f}", 100).replace("%", " points lost", 1)
                rows.append(
                    [f"{unit['title']}: {task} within 1 point", text, verdict(loss["low"], loss["high"], POINTS)]
                )
    return ["aim", "measured", ""], rows


def real_aims(label: str, stage: dict[str, Any]) -> Table:
    """Each aim on a real model, what was measured, and whether the loss and the size are reached."""
    rows = []
    for (name, size), most in zip(KL_AIMS, MOST_KL[label], strict=True):
        unit = summary.find(stage, name, "perplexity")
        if unit is not None:
            kl, bits = unit["metrics"]["kl"], unit["bits_per_element"]
            over = "reached" if bits <= size else f"missed by {bits - size:.2f}"
            cells = [summary.figure(kl, "{:.5f}", 1), verdict(kl["low"], kl["high"], most), f"{bits:.2f}", over]
            rows.append([f"{unit['title']}: KL of at most {most:g} at {size:g} bits", *cells])
    for name, most in PERPLEXITY_AIMS:
        unit = summary.find(stage, name, "perplexity")
        if unit is not None:
            change, bits = unit["metrics"]["perplexity_change"], unit["bits_per_element"]
            cells = [summary.figure(change, "{:+.2f}", 100), verdict(change["low"], change["high"], most)]
            rows.append([f"{unit['title']}: perplexity within {most:.1%}", *cells, f"{bits:.2f}", summary.NOTHING])
    outcomes = {row[0]: row[-1] for row in against(stage)[1]}
    if outcomes:
        behind = [f"{name}: {what}" for name, what in outcomes.items() if what != "lower"]
        missed = {"higher", NOT_SMALLER} & set(outcomes.values())
        reached = "missed" if missed else "undecided" if behind else "reached"
        measured = "\n".join([f"lower than {len(outcomes) - len(behind)} of {len(outcomes)}", *behind])
        rows.append(["KL below that of every baseline, at no more bits", measured, reached, *2 * [summary.NOTHING]])
    return ["aim", "measured", "loss", "bits", "size"], rows


def lost(own: dict[str, Any], got: dict[str, Any]) -> dict[str, float]:
    """The accuracy of the own cache minus that of a method, compared question by question."""
    pairs = zip(own["by_length"], got["by_length"], strict=True)
    differences = [x - y for a, b in pairs for x, y in zip(a["solved"], b["solved"], strict=True)]
    return bootstrap([differences, [1.0] * len(differences)], lambda sums: sums[0] / sums[1])


def verdict(low: float, high: float, most: float) -> str:
    """Undecided if the interval contains the bound, because the text was too short."""
    return "reached" if high <= most else "missed" if low > most else "undecided: the interval contains the bound"


def against(document: dict[str, Any], lag: bool = True) -> Table:
    """For each baseline, our method with the lowest KL among those of at most its size; `lag`: include methods with a
    lag. Two values of KL are not distinguishable if their intervals overlap."""
    points = loss_points(document, *LOSSES[0][::2])
    ours, rows = [point for point in points if point.own and (lag or not point.name.endswith(", lag"))], []
    for point in sorted((point for point in points if not point.own), key=lambda point: point.bits):
        fit = [one for one in ours if one.bits <= point.bits]
        best = min(fit, key=lambda one: one.value, default=None)
        cells = ["–", "–", "–", NOT_SMALLER]
        if best is not None:
            outcome = "lower" if best.high < point.low else "higher" if best.low > point.high else "not distinguishable"
            cells = [best.name, f"{best.bits:.2f}", f"{best.value:.5f}", outcome]
        rows.append([point.name, f"{point.bits:.2f}", f"{point.value:.5f}", *cells])
    return ["baseline", "bits", "KL", "best TurboAttention of at most that size", "bits", "KL", "its KL is"], rows


def lengths(document: dict[str, Any]) -> list[Table]:
    """A table for each generated task."""
    tables = []
    for task in ("recall", "needle", "copy", "arithmetic"):
        units = [summary.find(document, method["name"], task) for method in document["methods"]]
        found = [unit for unit in units if unit is not None]
        if found:
            columns = [task, *(f"{row['length']:,}" for row in found[0]["by_length"])]
            rows = [[u["title"], *(summary.figure(r, "{:.0f}", 100) for r in u["by_length"])] for u in found]
            tables.append((columns, rows))
    return tables
