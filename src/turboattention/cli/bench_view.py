"""The results of a benchmark as tables, one per kind of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .output import bytes_text

if TYPE_CHECKING:
    from ..benchmarking.records import Rival, Row
    from ..benchmarking.statistics import Spread

TITLES = {
    "prefill": "Prefill: INT8 attention over given tensors",
    "chunk": "Chunked prefill: 256 queries over a quantized cache",
    "decode": "Decode: one query over a quantized cache",
    "steps": "Decode step by step, new tokens stored",
    "compress": "Storing: one block of tokens through both stages",
    "memory": "Memory of a cache, all allocations",
}


def show(rows: Sequence[Row], facts: dict[str, Any], console: Console) -> None:
    console.print(facts_line(facts), style="dim", markup=False)
    makers = {"steps": _steps, "compress": _compress, "memory": _memory}
    captions = {
        "steps": "over the median step: the slowest that compresses a block, and the slowest of all",
        "compress": "over a decode step: a 64th of compressing a block at once, and appending one token, its share of "
        "compressing included",
        "memory": "w: a sliding window; below FP16: of the tokens in it; held/live: over a cache of only these tokens",
    }
    for work in dict.fromkeys(row.work for row in rows):
        part = [row for row in rows if row.work == work]
        table = makers.get(work, _speed)(part)
        table.title, table.title_justify, table.title_style = TITLES[work], "left", "bold"
        table.caption, table.caption_justify = captions.get(work), "left"
        console.print(table)
    if any(row.limit for row in rows):
        console.print(
            "limit: the processor limit that TurboAttention comes closest to, and the fraction reached; more "
            "than 100% of memory bandwidth: from the processor's caches, or measured while the machine was busy",
            style="dim",
            markup=False,
        )
    if any(rival.ratio for row in rows for rival in row.rivals):
        console.print("faster: the peer's time over TurboAttention's, in pairs [p20 p80]", style="dim", markup=False)


def facts_line(facts: dict[str, Any]) -> str:
    ggml = f", ggml {facts['ggml']}" if facts["ggml"] else ""
    peaks = "".join(f", {name} {value:.0f}" for name, value in facts.get("peaks", {}).items())
    return (
        f"{facts['cpu']}, threads: {facts['threads']}, backend {facts['backend']}, turboattention "
        f"{facts['turboattention']}, torch {facts['torch']}{ggml}{peaks}"
    )


def time_text(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return ""


def ratio_text(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.p20:.2f} {spread.p80:.2f}]"


def limit_text(row: Row) -> str:
    """E.g. "limit: memory bandwidth 71%"; empty for a row without one."""
    return "" if row.limit is None or row.limit_share is None else f"limit: {row.limit} {row.limit_share:.0%}"


def shape_text(row: Row) -> str:
    window = row.shape.get("window")  # files of earlier versions have none
    return f"{row.shape['keys']:,} d{row.shape['head_dim']}" + (f" w{window:,}" if window else "")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _speed(rows: Sequence[Row]) -> Table:
    """The line of the subject, then one line per peer; the first column continues next to the first peer."""
    table = _table("tokens", "who", "time", "GOPS", "error", "faster")
    table.columns[1].justify = "left"
    for row in rows:
        own = Text("turboattention", style="bold")
        if row.refused is not None:
            table.add_row(shape_text(row), own, "", "", "", Text(row.refused, style="red"))
            continue
        table.add_row(shape_text(row), own, *_cells(row), Text(limit_text(row), style="dim"))
        beside = row.bits or ("causal" if row.shape["causal"] else "full")
        for index, rival in enumerate(row.rivals):
            table.add_row("" if index else beside, *_rival(rival), end_section=index == len(row.rivals) - 1)
    return table


def _rival(rival: Rival) -> list[str | Text]:
    if rival.ratio is None:
        return [rival.peer, "", "", "", Text(rival.refused or "", style="yellow")]
    style = "green" if rival.ratio.p20 > 1 else "red" if rival.ratio.p80 < 1 else ""
    return [rival.peer, *_cells(rival), Text(ratio_text(rival.ratio), style=style)]


def _cells(timed: Row | Rival) -> list[str]:
    """Time, rate and error of a contender."""
    assert timed.seconds is not None and timed.gops is not None
    rate = f"{timed.gops:.0f}" if timed.gops >= 10 else f"{timed.gops:.1f}"
    return [time_text(timed.seconds.median), rate, f"{timed.error:.1e}"]


def _steps(rows: Sequence[Row]) -> Table:
    table = _table("tokens", "bits", "step", "at a flush", "slowest")
    for row in rows:
        assert row.seconds is not None
        figures = row.figures
        table.add_row(
            shape_text(row),
            row.bits,
            time_text(row.seconds.median),
            f"{figures['flush_over_median']:.2f}x",
            f"{figures['worst_over_median']:.2f}x",
        )
        if "deviation_from_line" in figures:
            line = f"{time_text(figures['seconds_per_token'] * 1000)} per 1,000 tokens"
            table.add_row("", "", line, "", f"off a line by {figures['deviation_from_line']:.0%}")
    return table


def _compress(rows: Sequence[Row]) -> Table:
    table = _table("tokens", "bits", "one block", "decode step", "per token", "one by one")
    for row in rows:
        assert row.seconds is not None
        figures = row.figures
        table.add_row(
            shape_text(row),
            row.bits,
            time_text(row.seconds.median),
            time_text(figures["decode_seconds"]),
            f"{figures['share']:.2%} [{figures['share_p20']:.2%} {figures['share_p80']:.2%}]",
            f"{figures['single_append_share']:.1%}",
        )
    return table


def _memory(rows: Sequence[Row]) -> Table:
    table = _table("tokens", "bits", "bytes", "below FP16", "bits/element", "held/live")
    for row in rows:
        figures = row.figures
        table.add_row(
            shape_text(row),
            row.bits,
            bytes_text(int(figures["bytes"])),
            f"{figures['below_fp16']:.2f}x",
            f"{figures['bits_per_element']:.2f}",
            f"{figures['bytes'] / figures['live_bytes']:.2f}x" if "live_bytes" in figures else "",
        )
    return table
