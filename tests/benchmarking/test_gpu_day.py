"""The script for a session on a GPU, rehearsed without one: it survives the crash and the hang among its steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "day.py"
INJECTED = ["--only", "facts", "--only", "a crash", "--only", "a hang"]


@pytest.mark.parametrize(
    ("selected", "done"), [(INJECTED, 1), pytest.param([], 30, marks=pytest.mark.long)], ids=["injected", "all"]
)
def test_rehearsal(tmp_path, selected, done):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path), *selected]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3700)
    last = ended.stdout.strip().splitlines()[-1]
    assert last.startswith(f"steps: {done} done, 0 wrong, 1 crashed, 1 timed out, 0 skipped"), ended.stdout
    assert ended.returncode == 0
