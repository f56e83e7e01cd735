"""What the kernels become on GPUs, without one: `PYTHONPATH=src python3 benchmarks/gpu/assembly.py [TARGET ...]`.

Compiles every kernel as its launcher launches it and prints a table, or JSON with --json; --write puts the table into
docs/gpu.md. TARGET: sm_80, sm_90, gfx942 (all by default).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from turboattention.files import write_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- assembly:begin -->", "<!-- assembly:end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--quick", action="store_true", help="every launch configuration once")
    parser.add_argument("--only", default="", help="calls whose name begins so")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write docs/gpu.md")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: interpreted kernels cannot be compiled")
    rows = [row for target in options.targets for row in compile_all(target, options.quick, options.only)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    text = table(rows)
    print(text)
    if options.write:
        page = PAGE.read_text()
        head, rest = page.split(BEGIN)
        write_text(PAGE, f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return 0


def compile_all(target: str, quick: bool, only: str = "") -> list[dict]:
    """A row for every kernel: what it is for, its name, registers, spills, shared memory, products."""
    import kernels
    import torch
    from compiling import cross_compiling

    rows = []
    for purpose, call in kernels.calls(quick):
        if not purpose.startswith(only):
            continue
        start = time.perf_counter()
        with torch.inference_mode(), cross_compiling(target) as compiled:
            call()
        print(f"{target} {purpose}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        for kernel in compiled:
            rows.append(
                {
                    "target": target,
                    "purpose": purpose,
                    "kernel": kernel.kernel,
                    "constants": {name: value for name, value in kernel.constants.items() if value is not None},
                    "warps": kernel.warps,
                    "stages": kernel.stages,
                    "registers": kernel.registers,
                    "spill_bytes": kernel.spill_bytes,
                    "shared": kernel.shared,
                    "instructions": kernel.instructions,
                    "products": kernel.products,
                    "multiplications": kernel.multiplications,
                    "accesses": kernel.accesses,
                    "inline_assembly": kernel.inline_assembly,
                    "packed_lanes": kernel.packed_lanes,
                    "overwritten": kernel.overwritten,
                }
            )
    return rows


ATTENTION = ("prefill", "decode")


def table(rows: list[dict]) -> str:
    """Of every call prefill or decode; what else they launch once for all that launch the same."""
    import triton

    lines = [
        f"Triton {triton.__version__}; registers of a thread (AMD: with accumulators), shared memory of a program.",
        "",
        "| GPU | for | kernel | integer products | instructions | registers | spilled bytes | shared | warps, stages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    told = set()
    for row in rows:
        same = tuple(row[name] for name in ("target", "kernel", "instructions", "registers", "shared", "warps"))
        if row["kernel"] not in ATTENTION and same in told:
            continue
        told.add(same)
        products = ", ".join(f"{count} {name}" for name, count in row["products"].items())
        lines.append(
            f"| {row['target']} | {row['purpose']} | {row['kernel']} | {products} | {row['instructions']} "
            f"| {row['registers']} | {row['spill_bytes']} | {row['shared']} | {row['warps']}, {row['stages']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
