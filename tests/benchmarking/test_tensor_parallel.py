"""benchmarks/tensor_parallel.py runs as documented, and two processes give the same result as one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tensor_parallel.py"


def test_two_processes_beside_one():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run(
        [*command, "--prompt-tokens", "200", "--max-new-tokens", "8"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = re.findall(r"^(rank \d of 2|single process) +(\d+) +([\d,]+) +[\d.]+x$", done.stdout, re.MULTILINE)
    assert [(name, heads) for name, heads, _ in rows] == [
        ("rank 0 of 2", "1"),
        ("rank 1 of 2", "1"),
        ("single process", "2"),
    ]
    sizes = [int(size.replace(",", "")) for *_, size in rows]
    assert sizes[0] == sizes[1] == pytest.approx(sizes[2] / 2, rel=0.01)
    assert done.stdout.endswith("\nsame tokens: yes\n")
