"""The table of compiled kernels in docs/gpu.md, from the rows of several releases of Triton."""

from __future__ import annotations

from typing import Any

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
