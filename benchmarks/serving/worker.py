"""One task in a separate process: `worker.py TASK SPEC.json RESULT.json`, where TASK is a module's `run`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

TASKS = ("calibration_run", "capacity_run", "throughput_run", "quality_run", "soak_run", "solo_run")


def main(task: str, given: str, made: str) -> None:
    if task not in TASKS:
        raise SystemExit(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    spec = json.loads(Path(given).read_text(encoding="utf-8"))
    result = importlib.import_module(task).run(spec)
    Path(made).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # The result is written: an engine that shuts down slowly must not delay the next one.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
