"""Tables for people, and a plot a table."""

from __future__ import annotations

from pathlib import Path

from turboattention.benchmarking.records import Row
from turboattention.files import write_figure


def line(row: Row) -> str:
    """One row in words."""
    shape = row.shape
    what = f"{row.work:10} batch {shape['batch']:4} keys {shape['keys']:6}"
    what += f" {'causal' if shape.get('causal') else '':6} {row.bits or '-':>5}  {row.subject:20}"
    if row.refused or row.seconds is None:
        return f"{what} not timed: {row.refused}"
    figures = "  ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    text = f"{what} {row.seconds.median * 1e3:9.3f} ms  {figures}"
    for rival in row.rivals:
        if rival.ratio is not None and rival.seconds is not None:
            text += f"\n    {rival.ratio.median:6.2f} x {rival.name} ({rival.seconds.median * 1e3:.3f} ms)"
        else:
            text += f"\n         - {rival.name}: {rival.refused}"
    return text


def plot(path: Path, rows: list[Row], title: str) -> bool:
    """Bars: each rival's time over TurboAttention's, or the rows' own times where there are none. False
    without matplotlib, or without times."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    timed = [row for row in rows if row.seconds is not None]
    if not timed:
        return False
    names = list(dict.fromkeys(r.name for row in timed for r in row.rivals if r.ratio is not None))
    figure = Figure(figsize=(max(6.0, 1.1 * len(timed)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for at, name in enumerate(names):
        ratios = [(i, r.ratio.median) for i, row in enumerate(timed) for r in row.rivals if r.name == name and r.ratio]
        axes.bar([i + at * width for i, _ in ratios], [ratio for _, ratio in ratios], width, label=name)
    if names:
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.legend(fontsize=6)
        axes.set_ylabel("peer's time / TurboAttention's")
    elif timed[0].work == "throughput":
        axes.bar(range(len(timed)), [row.figures["tokens/s"] for row in timed])
        axes.set_ylabel("tokens / s")
    else:
        axes.bar(range(len(timed)), [row.seconds.median * 1e3 for row in timed if row.seconds])
        axes.set_ylabel("ms")
    labels = [f"{row.bits or '16 bit'}\n{row.shape['batch']} x {row.shape['keys']:,}" for row in timed]
    axes.set_xticks(range(len(timed)), labels, fontsize=6)
    axes.set_title(title, fontsize=8)
    write_figure(path, figure)
    return True
