"""Steps as processes of their own, each with a time limit: one that crashes or hangs costs its own time alone.

What they find is a JSON line each in `results.jsonl`, written through as it is found; a later run over the same file
leaves out the steps that it says were done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DONE, WRONG, CRASHED, TIMED_OUT, SKIPPED = "done", "wrong", "crashed", "timed out", "skipped"
FOUND_WRONG = 3
"""Exit status of a step that ran to its end and found wrong results."""
LEFT_OUT = 4
"""Exit status of a step that left something out, for want of time or of what it needs."""

NO_TIME = "no time left"
"""Why a step was skipped whose turn came after the budget was spent."""

_LEAST_SECONDS = 3.0  # a process takes as long to start


@dataclass(frozen=True)
class Step:
    """name: of the step; seconds: its time limit; expected: what it probably takes, for `outlook`; beside: whether it
    runs side by side with its neighbours that say the same; sound: steps that must not have found wrong results before
    it."""

    name: str
    seconds: float
    expected: float = 0.0
    beside: bool = False
    sound: tuple[str, ...] = ()


class Results:
    """Lines of a file: rows of steps, and how steps ended."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: str, **row: Any) -> None:
        line = json.dumps({"step": step, **row}).encode() + b"\n"
        with self.path.open("ab+") as file:  # one write: steps side by side share the file
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # behind one that was cut off
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self, step: str | None = None) -> list[dict[str, Any]]:
        """What steps found, not how they ended; a last line that was cut off is left out."""
        return [row for row in self._lines() if "ended" not in row and step in (None, row["step"])]

    def ended(self) -> dict[str, str]:
        """How each step ended last."""
        return {row["step"]: row["ended"] for row in self._lines() if "ended" in row}

    def skipped_for(self, why: str) -> bool:
        """Whether a step ended last because of this."""
        last = {row["step"]: row.get("why") for row in self._lines() if "ended" in row}
        return why in last.values()

    def keep_apart(self, commit: str) -> Path | None:
        """Rename a file whose last session ran other sources, so that no step of it counts as done; its new name."""
        sessions = [row["commit"] for row in self.rows("session")]
        if not sessions or "unknown" in (sessions[-1], commit) or sessions[-1] == commit:
            return None
        kept = self.path.with_name(f"{self.path.stem}-{sessions[-1][:12]}-{len(sessions)}.jsonl")
        return self.path.rename(kept)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def outlook(steps: Sequence[Step], budget: float) -> tuple[list[str], list[str]]:
    """The steps that probably end within `budget` seconds, if all run in order, and the others."""
    spent, within, beyond = 0.0, [], []
    for together in _groups(steps):
        spent += max(step.expected for step in together)
        (within if spent <= budget else beyond).extend(step.name for step in together)
    return within, beyond


def run_steps(
    steps: Sequence[Step], command: Callable[[Step], list[str]], results: Results, log: Path, budget: float
) -> Counter[str]:
    """Runs the steps in order, `command(step)` each, until `budget` seconds are spent; counts how they ended."""
    begin, before, counts = time.monotonic(), results.ended(), Counter()
    for together in _groups([step for step in steps if before.get(step.name) != DONE]):
        ended = results.ended()
        fit = []
        for step in together:
            wrong = [name for name in step.sound if ended.get(name) in (WRONG, CRASHED, TIMED_OUT)]
            left = budget - (time.monotonic() - begin)
            if wrong or left < _LEAST_SECONDS:
                why = f"{wrong[0]} {ended[wrong[0]]}" if wrong else NO_TIME
                _tell(results, counts, step, SKIPPED, 0.0, why)
            else:
                fit.append((step, min(step.seconds, left)))
        for step, status, seconds in _side_by_side(fit, command, log):
            _tell(results, counts, step, status, seconds)
    return counts


def _groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Neighbours that run side by side, and the others alone."""
    held: list[Step] = []
    for step in steps:
        if held and not (step.beside and held[-1].beside):
            yield held
            held = []
        held.append(step)
    if held:
        yield held


def _side_by_side(
    fit: Sequence[tuple[Step, float]], command: Callable[[Step], list[str]], log: Path
) -> Iterator[tuple[Step, str, float]]:
    """Runs all, and says of each how it ended and after how many seconds."""
    with log.open("ab") as file:
        begin = time.monotonic()
        running = [
            (step, seconds, subprocess.Popen(command(step), stdout=file, stderr=file, start_new_session=True))
            for step, seconds in fit
        ]
        while running:
            time.sleep(0.05)
            for entry in list(running):
                step, seconds, process = entry
                spent, status = time.monotonic() - begin, process.poll()
                if status is None and spent < seconds:
                    continue
                if status is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                    process.wait()
                running.remove(entry)
                yield step, TIMED_OUT if status is None else _ENDS.get(status, CRASHED), spent


_ENDS = {0: DONE, FOUND_WRONG: WRONG, LEFT_OUT: SKIPPED}


def _tell(results: Results, counts: Counter[str], step: Step, status: str, seconds: float, why: str = "") -> None:
    counts[status] += 1
    results.write(step.name, ended=status, seconds=round(seconds, 1), **({"why": why} if why else {}))
    print(f"{step.name:24} {status:9} {seconds:6.1f} s  {why}", flush=True)
