"""The pictures of docs/serving.md. Each returns a matplotlib `Figure`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sections import MIB
from throughput_section import middle, scenarios

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def capacity(document: dict[str, Any]) -> Figure:
    """Bars per model: tokens per GiB of pages, and of pages and tail slots."""
    models = list(dict.fromkeys(row["model"] for row in document["rows"]))
    figure = _figure(5.2 * len(models), 3.6)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows = [row for row in document["rows"] if row["model"] == model]
        positions = range(len(rows))
        axes.bar(positions, [row["tokens_per_gib"] for row in rows], 0.8, color="C0", label="pages")
        axes.bar(
            positions,
            [row["with_side_pool"] for row in rows],
            0.5,
            color="C1",
            label="pages and tail slots (in brackets)",
        )
        for position, row in zip(positions, rows, strict=True):
            times = (
                f"{row['times']:.2f}x"
                if row["times"] == 1
                else f"{row['times']:.2f}x\n({row['times_with_side_pool']:.2f})"
            )
            axes.annotate(times, (position, row["tokens_per_gib"]), ha="center", va="bottom", fontsize=7)
        axes.set_xticks(positions, [_short(row["title"]) for row in rows], fontsize=7)
        axes.set_title(model, fontsize=9)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
        axes.set_ylabel("tokens of cache per GiB")
        axes.margins(y=0.12)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def throughput(document: dict[str, Any]) -> Figure:
    """Against the budget, with all requests at once: tokens a second, first token, time per token."""
    burst = _burst(document)
    panels = (
        ("output tokens / s", "output_tokens_per_second", None, 1.0),
        ("first token, p50, s", "first_token", "p50", 1.0),
        ("time per output token, p95, ms", "per_token", "p95", 1e3),
        ("preemptions", "num_preemptions", None, 1.0),
    )
    figure = _figure(3.4 * len(panels), 3.2)
    for axes, (label, name, at, factor) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _lines(axes, burst, name, at, factor)
        axes.set_title(label, fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{document['model']}, {document['plan']['requests']} requests at once", fontsize=10)
    return figure


def real_model(document: dict[str, Any]) -> Figure:
    """Bars per cache, with all requests at once at the smallest budget: tokens held and generated, waiting, KL."""
    burst = _burst(document)
    budget = min(burst)
    found = burst[budget].values()
    panels = [
        ("tokens of cache", [rows[0]["tokens"] for rows in found]),
        ("output tokens / s", [middle(rows, "output_tokens_per_second") for rows in found]),
        ("first token, p50, s", [middle(rows, "first_token", "p50") for rows in found]),
    ]
    if document["quality"]:
        figures = document["quality"]["contenders"]
        kl = [figures.get(rows[0]["contender"], {"kl": 0.0})["kl"] for rows in found]  # 16 bits beside themselves: 0
        panels.append(("KL beside 16 bits, nats", kl))
    figure = _figure(3.4 * len(panels), 3.0)
    for axes, (label, heights) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.bar(range(len(heights)), heights, 0.7, color=[f"C{place}" for place in range(len(heights))])
        axes.set_xticks(range(len(heights)), [_short(rows[0]["title"]) for rows in found], fontsize=6)
        axes.set_title(label, fontsize=9)
        axes.yaxis.set_major_formatter("{x:,.6g}")
    requests = document["plan"]["requests"]
    figure.suptitle(f"{document['model']}, {requests} requests at once, {budget / MIB:,.0f} MiB of cache", fontsize=10)
    return figure


def _burst(document: dict[str, Any]) -> dict[int, Any]:
    """By budget, with all requests at once."""
    return {budget: found for (budget, load), found in scenarios(document).items() if load == "all at once"}


def _lines(axes: Axes, burst: dict[int, Any], name: str, at: str | None, factor: float) -> None:
    budgets = sorted(burst)
    for contender in burst[budgets[0]]:
        rows = [burst[budget][contender] for budget in budgets]
        heights = [middle(row, name, at) * factor for row in rows]
        axes.plot([budget / MIB for budget in budgets], heights, marker="o", markersize=3, label=rows[0][0]["title"])
    axes.set_xscale("log", base=2)
    axes.set_xticks([budget / MIB for budget in budgets], [f"{budget / MIB:,.0f}" for budget in budgets])
    axes.set_xlabel("memory for the cache, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.3)


def _short(title: str) -> str:
    return title.partition(", ")[2].replace(", ", "\n").replace(" 2 and 4 bits", "\n2 and 4 bits")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
