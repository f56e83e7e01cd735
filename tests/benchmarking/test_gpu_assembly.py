"""The tables of compiled kernels in docs/gpu.md, from the rows of several releases of Triton."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from ..scripts import benchmark_script


def row(triton: str, kernel: str = "decode", mask: str = "", **changes: Any) -> dict[str, Any]:
    constants = {"D": 128, "MASK": mask}
    numbers = {"warps": 1, "stages": 3, "shared": 17408, "instructions": 4673, "registers": 255, "spill_bytes": 8}
    return {"triton": triton, "target": "sm_90", "purpose": "decode d128", "kernel": kernel} | {
        "constants": constants,
        **numbers,
        **changes,
    }


def test_a_line_per_kernel_and_a_column_per_release():
    rows = [row("3.9.0", instructions=4501), row("3.6.0"), row("3.6.0", purpose="the same again")]
    rows += [row("3.6.0", mask="bool"), row("3.6.0", kernel="combine"), row("3.6.0", kernel="prefill", registers=9)]
    with benchmark_script("gpu/assembly.py") as assembly:
        lines = assembly.table(rows).splitlines()[3:]
    assert lines == [
        "| GPU | for | kernel | warps, stages | shared | Triton 3.6.0 | Triton 3.9.0 |",
        "|---|---|---|---|---|---|---|",
        "| sm_90 | decode d128 | decode | 1, 3 | 17,408 | 4,673; 255; 8 | 4,501; 255; 8 |",
        "| sm_90 | decode d128 | prefill | 1, 3 | 17,408 | 4,673; 9; 8 | – |",
    ]


def test_the_counts_of_loops_in_the_docs_are_those_recorded():
    with benchmark_script("gpu/loop_counts.py") as counts:
        rows = json.loads(counts.RESULTS.read_text(encoding="utf-8"))["rows"]
        page = counts.PAGE.read_text(encoding="utf-8")
        assert counts.written(page, rows) == page, "write it: benchmarks/gpu/loop_counts.py --write"
        every = {(when, release) for when in ("before", "now") for release in ("3.6.0", "3.9.0")}
        assert Counter((row["when"], row["triton"]) for row in rows) == dict.fromkeys(every, 6)
        changed = [{**row, "waits": row["waits"] + 1} for row in rows]
        assert counts.written(page, changed) != page


@pytest.mark.parametrize("warps", [1, 4])
def test_the_loop_that_copies_pages_ahead_is_counted(warps):
    """Not the outer one around it, nor loops without copies; by all warps."""
    code = ["IMMA.16832.S8.S8", "BRA", "MOV", "LDGSTS.E", "LDGSTS.E.BYPASS", "BAR.SYNC", "IMMA.16832.S8.S8", "LDG.E"]
    code += ["LDGDEPBAR", "DEPBAR.LE", "BRA", "LDL", "BRA"]
    kernel = SimpleNamespace(code=code, loops=[(0, 1), (3, 10), (2, 12)], warps=warps)
    with benchmark_script("gpu/loop_counts.py") as counts:
        found = counts.page_loop(kernel)
    want = {"instructions": 8, "products": 1, "copies": 2, "global loads": 1, "waits": 2, "spilled words read": 0}
    assert found == {name: count * warps for name, count in want.items()}
