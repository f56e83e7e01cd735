"""Output of commands: results on stdout, as a table or JSON; everything else on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from ..errors import GuardWarning

_WIDE = 120
"""Width of results in files and pipes, so large that no table is wrapped."""


def results() -> Console:
    """The console for results: stdout."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(highlight=False, width=wide)


def notices() -> Console:
    """The console for progress, warnings and notes: stderr."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=plain))


def never_fail_on_characters() -> None:
    """Show characters that the terminal cannot encode as "?" instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def note(text: str, kind: str = "note") -> None:
    """One line on stderr."""
    notices().print(f"{kind}: {text}", style="yellow" if kind == "warning" else "dim", markup=False, soft_wrap=True)


@contextmanager
def guard_warnings(*, show: bool) -> Iterator[list[str]]:
    """Collect the guard's warnings, and print them immediately if requested."""
    said: list[str] = []

    def take(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, GuardWarning):
            said.append(str(message))
            if show:
                note(str(message), "warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always", GuardWarning)
        warnings.showwarning = take
        yield said


def bytes_text(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.{2 if size < 10 else 1}f} {unit}"


def share_text(share: float | None) -> str:
    """0.984 -> "98.4%". Only 1 is shown as 100%."""
    if share is None:
        return "–"
    return "100%" if share == 1 else f"{min(share * 100, 99.9):.1f}%"


def number_text(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
