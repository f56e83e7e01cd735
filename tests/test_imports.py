"""A cold import needs only torch and NumPy, and is fast in addition to torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
HEAVY = {"matplotlib", "rich", "safetensors", "transformers", "triton", "typer"}

PROBE = """
import json, sys, time
import torch
sys.path.insert(0, {source!r})
before = set(sys.modules)
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})]))
"""

FIRST_CALL = """
import turboattention as ta
x = torch.ones(1, 2, 3, 8)
ta.turbo_attention(x, x, x)
ta.KVCache(1, 2, 8).append(x, x)
ta.backends()
"""


def cold(statement: str) -> tuple[float, set[str]]:
    """Runs a statement in a new interpreter that has torch: its seconds, and the packages it brought in."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(source=str(SOURCE), statement=statement)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, packages = json.loads(run.stdout)
    return seconds, set(packages)


@pytest.mark.parametrize("statement", ["import turboattention", FIRST_CALL], ids=["import", "first call"])
def test_brings_in_nothing_heavy(statement: str) -> None:
    _, packages = cold(statement)
    assert "turboattention" in packages
    assert packages & HEAVY == set()


def test_import_takes_under_0_3_seconds_on_top_of_torch() -> None:
    assert min(cold("import turboattention")[0] for _ in range(3)) < 0.3
