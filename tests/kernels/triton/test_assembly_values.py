"""Assembly of the kernels for keys of 192 and values of 128 channels, compiled for sm_90 without a GPU: values are not
padded to the keys' width, and nothing spills. Minutes: `make test-long` runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "assembly.py"
K_DIM, V_DIM = 192, 128


def compiled(purpose: str, kernel: str) -> list[dict[str, Any]]:
    """What `kernel` becomes in the calls for `purpose`, in a process of its own, which does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2] / "src")
    command = [sys.executable, str(SCRIPT), "sm_90", "--json", "--only", purpose]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [row for row in json.loads(done.stdout) if row["kernel"] == kernel]


@pytest.mark.parametrize(
    "purpose, kernel, calls, products",
    [
        ("prefill d192, values of 128", "prefill", 1, ("IGMMA",)),
        ("decode d192, values of 128, int4", "decode", 2, ("IGMMA", "IMMA")),  # K of one width, and of two
    ],
)
def test_values_of_their_own_width(purpose: str, kernel: str, calls: int, products: tuple[str, ...]) -> None:
    rows = compiled(purpose, kernel)
    assert len(rows) == calls
    for row in rows:
        sizes = {name: row["constants"][name] for name in ("D", "DV", "V_WIDE")}
        assert sizes == {"D": K_DIM, "DV": V_DIM, "V_WIDE": V_DIM}
        assert row["spill_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= 227 << 10
        assert row["products"]
        assert all(name.startswith(products) for name in row["products"])
