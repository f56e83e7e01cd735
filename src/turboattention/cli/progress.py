"""Progress bars on stderr, if that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .output import notices

Update = Callable[[int, int], None]
"""Called with the number of finished steps and of all steps."""


class Bars:
    """One bar at a time, removed when its task is finished."""

    def __init__(self, *, hidden: bool):
        self._hidden = hidden

    @contextmanager
    def task(self, description: str) -> Iterator[Update]:
        """A bar that pulses until the first update."""
        console = notices()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        disabled = self._hidden or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=disabled) as progress:
            bar = progress.add_task(description, total=None, count="")

            def update(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total, count=f"{done}/{total}")

            yield update
