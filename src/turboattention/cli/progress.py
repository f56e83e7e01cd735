"""Progress on stderr: bars on a terminal, otherwise an occasional line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .output import note, notices

Update = Callable[[int, int], None]
"""Called with the number of finished steps and of all steps."""


SECONDS_A_LINE = 30
"""Seconds between two lines of progress without a terminal; shorter tasks print nothing."""


class Bars:
    """One bar at a time, removed when its task is finished."""

    def __init__(self, *, hidden: bool):
        self._hidden = hidden

    @contextmanager
    def task(self, description: str) -> Iterator[Update]:
        """A bar that pulses until the first update."""
        console = notices()
        if not self._hidden and not console.is_terminal:
            yield _lines(description)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=self._hidden) as progress:
            bar = progress.add_task(description, total=None, count="")

            def update(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total, count=f"{done}/{total}")

            yield update


def _lines(description: str) -> Update:
    """Prints the progress of a long task, one line every `SECONDS_A_LINE`."""
    begin = said = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_A_LINE:
            said = now
            note(f"{description}: {done} of {total} parts after {now - begin:.0f} s")

    return update
