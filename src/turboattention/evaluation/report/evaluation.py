"""The page of ``turboattention eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .charts import Point, heat_map, lines, pareto
from .page import Page
from .summary import NOTHING, bits, bits_text, figure, find, table, tasks

MEASURED = (
    "Everything is read through the cache under test: a text is fed in short pieces, and each attends to the stored "
    "form of the pieces before it. Brackets are 95 % intervals: bootstrapped over stretches of 128 tokens for texts, "
    "Wilson's for proportions. KL, top-1 and the change of perplexity compare each token with the model's own "
    "cache. Bits per element are those of the caches at the end of the texts, with scales, zeros and full-precision "
    "windows."
)
LOSSES = (("kl", "KL from the own cache, nats", 1), ("perplexity_change", "perplexity change, %", 100))


def html(document: dict[str, Any]) -> str:
    """The HTML page for a document of `suite.document`."""
    facts = document["facts"]
    page = Page("KV cache methods compared", ", ".join(f"{name} {value}" for name, value in facts.items()))
    columns, rows = table(document)
    page.section("Results")
    page.table(columns, rows, strong=_own_rows(document, rows))
    page.note(MEASURED)
    _trade(page, document)
    _by_position(page, document)
    for task in tasks(document):
        _by_length(page, document, task)
    _answers(page, document)
    _heads(page, document)
    _methods(page, document)
    return page.html()


def _own_rows(document: dict[str, Any], rows: Sequence[Sequence[str]]) -> list[int]:
    own = {method["title"] for method in document["methods"] if _is_own(method["name"])}
    return [index for index, row in enumerate(rows) if row[0] in own]


def _is_own(name: str) -> bool:
    return name.startswith("turbo-")  # but not turboquant-4


def _trade(page: Page, document: dict[str, Any]) -> None:
    for metric, label, scale in LOSSES:
        points = loss_points(document, metric, scale)
        if len(points) > 1:
            if metric == LOSSES[0][0]:
                page.section("Accuracy against size")
            title = f"{label[0].upper()}{label[1:]} against bits per element, with 95 % intervals"
            # Perplexity can decrease by chance, so it gets no Pareto front.
            page.figure(pareto(points, ylabel=label, with_front=metric == "kl"), title)


def loss_points(document: dict[str, Any], metric: str, scale: float) -> list[Point]:
    """Methods with their size and loss; not the model's own cache, which has none by definition."""
    points = []
    for method in document["methods"]:
        unit, size = find(document, method["name"], "perplexity"), bits(document, method["name"])
        if unit and size and unit["metrics"]["kl"]["value"] > 0:
            value, low, high = (unit["metrics"][metric][key] * scale for key in ("value", "low", "high"))
            points.append(Point(method["title"], size, value, low, high, _is_own(method["name"])))
    return points


def _by_position(page: Page, document: dict[str, Any]) -> None:
    units = {m["title"]: find(document, m["name"], "perplexity") for m in document["methods"]}
    found = {title: unit["by_position"] for title, unit in units.items() if unit}
    if not found:
        return
    own = [method["title"] for method in document["methods"] if _is_own(method["name"])]
    page.section("By position")
    for name, label in (
        ("kl", "KL from the own cache, nats"),
        ("top1", "share of tokens with the same likeliest token"),
    ):
        series = {title: (rows["position"], rows[name]) for title, rows in found.items() if any(rows["kl"])}
        if series:
            drawn = lines(series, xlabel="tokens before", ylabel=label, logarithmic=name == "kl", emphasized=own)
            page.figure(drawn, f"{label[0].upper()}{label[1:]}, by the number of tokens in the cache")


def _by_length(page: Page, document: dict[str, Any], task: str) -> None:
    units = {m["title"]: find(document, m["name"], task) for m in document["methods"]}
    found = {title: unit["by_length"] for title, unit in units.items() if unit and "by_length" in unit}
    if not found:
        return
    lengths = sorted({row["length"] for rows in found.values() for row in rows})
    page.section(f"{task.capitalize()} by context length")
    body = []
    for title, rows in found.items():
        by_length = {row["length"]: row for row in rows}
        body.append([title, *(figure(by_length.get(length), "{:.1f}", 100) for length in lengths)])
    page.table(["method", *(f"{length:,} tokens" for length in lengths)], body)


def _answers(page: Page, document: dict[str, Any]) -> None:
    """Further metrics of tasks whose answers are text."""
    units = [unit for unit in document["units"] if unit.get("questions") and "failed" not in unit]
    if not units:
        return
    page.section("Questions")
    body = []
    for unit in units:
        for name, metric in unit["metrics"].items():
            shots = str(unit.get("fewest_shots", NOTHING))
            figures = [figure(metric, "{:.1f}", 100), str(unit["questions"]), shots]
            body.append([unit["task"], unit["title"], name, *figures, bits_text(unit.get("bits_per_element"))])
    page.table(["task", "method", "figure", "value", "questions", "examples shown", "bits/element"], body)
    page.note(
        "Examples shown: the fewest that any question had before it; as many are used as fit the model's context."
    )


def _heads(page: Page, document: dict[str, Any]) -> None:
    units = {m["title"]: find(document, m["name"], "heads") for m in document["methods"]}
    found = {title: unit for title, unit in units.items() if unit and unit["metrics"]["worst_error"]["value"] > 0}
    if not found:
        return
    page.section("Where the errors are")
    page.note(
        "Relative error of the attention output by layer and query head. Every layer gets the input that it has with "
        "the model's own cache, so that errors do not propagate."
    )
    page.table(
        ["method", "mean error", "largest error"],
        [
            [title, *(f"{unit['metrics'][name]['value']:.4f}" for name in ("mean_error", "worst_error"))]
            for title, unit in found.items()
        ],
    )
    # One color scale for all methods; it ends at the 90th percentile.
    every = sorted(error for unit in found.values() for row in unit["errors"] for error in row)
    highest = every[int(len(every) * 0.9)]
    for title, unit in found.items():
        page.figure(
            heat_map(unit["errors"], title=title, label="relative error", highest=highest),
            f"{title}: error by layer and head; the colours end at {highest:.3f}",
        )


def _methods(page: Page, document: dict[str, Any]) -> None:
    page.section("Methods")
    rows = [[method[name] for name in ("title", "settings", "source")] for method in document["methods"]]
    page.table(["method", "settings", "source"], rows)
    for unit in document["units"]:
        if "failed" in unit:
            page.note(f"{unit['task']}, {unit['title']}: not measured: {unit['failed']}")
    for warning in dict.fromkeys(f"{u['title']}: {w}" for u in document["units"] for w in u.get("warnings", [])):
        page.note(warning)
