"""An evaluation as a table, and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluation.records import write_whole
from ..evaluation.report import evaluation, summary

LEGEND = (
    "Read through the cache under test, in short pieces. bits/element: everything that the cache keeps. KL, top-1 and "
    "the change of perplexity: token by token against the model's own cache. Intervals are in the report and the JSON."
)
COLUMNS = 5
"""The results in one table."""


def show(document: dict[str, Any], console: Console) -> None:
    """One row per method."""
    facts = document["facts"]
    console.print(
        f"Model {facts['model']} in {facts['dtype']} on {facts['device']}.", style="dim", markup=False, highlight=False
    )
    columns, rows = summary.table(document, intervals=False, called="name")
    # The number of columns that fit into a narrow terminal.
    for at in range(1, len(columns) if rows else 1, COLUMNS):
        shown = [0, *range(at, min(at + COLUMNS, len(columns)))]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for index in shown:
            table.add_column(_header(columns[index]), justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[index] for index in shown))
        console.print(table)
    console.print(LEGEND, style="dim", markup=False)


def _header(name: str) -> str:
    """Wrap a title over several lines, so that its column is narrow."""
    return name.replace(" / ", "/\n").replace(" ", "\n").replace("lm-eval/", "lm-eval/\n").replace("bbh/", "bbh/\n")


def write(folder: Path | None, document: dict[str, Any]) -> None:
    """Write ``results.json`` and ``report.html``, each atomically."""
    if folder is not None:
        write_whole(folder / "results.json", json.dumps(document, indent=1) + "\n")
        write_whole(folder / "report.html", evaluation.html(document))


def failures(document: dict[str, Any]) -> list[str]:
    """One line for each unit that could not be measured."""
    return [f"{unit['task']}, {unit['title']}: {unit['failed']}" for unit in document["units"] if "failed" in unit]
