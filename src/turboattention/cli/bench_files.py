"""``--out`` and ``--plot``: a benchmark as JSON and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_figure, write_text
from .missing import INSTALL
from .targets import check_target

if TYPE_CHECKING:
    from ..benchmarking.records import Row

_RATIOS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


def check_plot(path: Path | None) -> None:
    """Raises InputError if matplotlib is not installed or does not support this file type."""
    check_target("--plot", path)
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(f"--plot: needs the package matplotlib: {INSTALL}") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"--plot: expected a file ending in one of {', '.join(sorted(known))}, got {path.name}")


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_plot(path: Path, rows: list[Row], title: str) -> bool:
    """Plot each peer's time divided by TurboAttention's against context length; False if nothing was compared."""
    from matplotlib.figure import Figure

    lines = ratio_lines(rows)
    if not lines:
        return False
    works = list(dict.fromkeys(work for work, _ in lines))
    figure = Figure(figsize=(5.5 * len(works), 4.8), layout="constrained")
    for axes, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works, strict=True):
        for (of, label), points in lines.items():
            if of == work:
                lengths, ratios, low, high = zip(*sorted(points), strict=True)
                (line,) = axes.plot(lengths, ratios, marker="o", markersize=3, linewidth=1, label=label)
                axes.fill_between(lengths, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({point[0] for (of, _), points in lines.items() if of == work for point in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        marks = [mark for mark in _RATIOS if axes.get_ylim()[0] <= mark <= axes.get_ylim()[1]]
        axes.set_yticks(marks, [f"{mark:g}x" for mark in marks])
        axes.grid(axis="y", linewidth=0.3)
        axes.set(title=work, xlabel="tokens", ylabel="peer's time / TurboAttention's")
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)
    figure.suptitle("\n".join(wrap(title, 70 * len(works))), fontsize=8)
    write_figure(path, figure, "--plot")
    return True


def ratio_lines(rows: list[Row]) -> dict[tuple[str, str], list[tuple[int, float, float, float]]]:
    """(work, label) -> points (tokens, median, p20, p80)."""
    lines: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        shape = row.shape
        mask = ("causal " if shape["causal"] else "full ") if row.work == "prefill" else ""
        own = f"{row.bits or ''} {mask}d{shape['head_dim']}".strip()
        for rival in row.rivals:
            if rival.ratio is not None:
                point = (shape["keys"], rival.ratio.median, rival.ratio.p20, rival.ratio.p80)
                lines.setdefault((row.work, f"{own} / {rival.name}"), []).append(point)
    return lines
