"""Each engine in a separate process: `call` runs one task of `worker.py` and returns its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build" / "serving"

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker itself, where its memory can be seen
    "VLLM_CPU_CI_ENV": "1",  # no warm-up by compiling
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, with the package of this source tree."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **_SETTINGS, "PYTHONPATH": os.pathsep.join(paths), **more}


def call(task: str, spec: Mapping[str, Any], more: Mapping[str, str], log: str) -> dict[str, Any]:
    """The result of `worker.py`'s `task`. Its output is shown; that of vLLM goes to build/serving/`log`.log.

    Raises:
        RuntimeError: the process failed; its last lines.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    said = BUILD / f"{log}.log"
    with tempfile.TemporaryDirectory() as folder, said.open("w", encoding="utf-8") as stream:
        given, made = Path(folder, "spec.json"), Path(folder, "result.json")
        given.write_text(json.dumps(spec), encoding="utf-8")
        script = [sys.executable, str(Path(__file__).with_name("worker.py")), task, str(given), str(made)]
        ran = subprocess.run(script, env=environment(more), stderr=stream, check=False)
        if ran.returncode or not made.exists():
            raise RuntimeError(f"{task}: ended with {ran.returncode}\n{_tail(said)}")
        return json.loads(made.read_text(encoding="utf-8"))


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
