"""Assembly of the kernels, without a GPU: `PYTHONPATH=src python3 benchmarks/gpu/assembly.py [TARGET ...]`.

Compiles every kernel as its launcher launches it and prints a table, or JSON with --json. TARGET: sm_80, sm_90, gfx942
(all by default). With `--write FILE ...`, nothing is compiled: docs/gpu.md gets the table of what --json printed with
one or several releases of Triton.
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
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", help="write docs/gpu.md from these")
    options = parser.parse_args()
    if options.write:
        found = [row for file in options.write for row in json.loads(file.read_text(encoding="utf-8"))]
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        write_text(PAGE, f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: interpreted kernels cannot be compiled")
    rows = [row for target in options.targets for row in compile_all(target, options.quick, options.only)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(table(rows))
    return 0


def compile_all(target: str, quick: bool, only: str = "") -> list[dict]:
    """A row for every kernel: what it is for, its name, registers, spills, shared memory, products."""
    import kernels
    import torch
    import triton
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
                    "triton": triton.__version__,
                    "target": target,
                    "purpose": purpose,
                    "kernel": kernel.kernel,
                    "constants": {name: value for name, value in kernel.constants.items() if value is not None},
                    "warps": kernel.warps,
                    "stages": kernel.stages,
                    "registers": kernel.registers,
                    "spill_bytes": kernel.spill_bytes,
                    "spills_in_loops": kernel.spills_in_loops,
                    "shared": kernel.shared,
                    "instructions": kernel.instructions,
                    "products": kernel.products,
                    "multiplications": kernel.multiplications,
                    "accesses": kernel.accesses,
                    "inline_assembly": kernel.inline_assembly,
                    "packed_lanes": kernel.packed_lanes,
                    "overwritten": kernel.overwritten,
                    "from_registers": kernel.from_registers,
                }
            )
    return rows


ATTENTION = ("prefill", "decode", "paged_prefill", "paged_decode")


def table(rows: list[dict]) -> str:
    """Of every kernel of attention without a mask or softcap, what it becomes with each release of Triton.

    rows: of one or several releases. Where calls differ in other kernels only, the first is listed.
    """
    releases = sorted({row["triton"] for row in rows})
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["kernel"] in ATTENTION and not (row["constants"].get("MASK") or row["constants"].get("CAP")):
            what = row["target"], row["kernel"], repr(row["constants"])
            found.setdefault(what, {}).setdefault(row["triton"], row)
    columns = ["GPU", "for", "kernel", "warps, stages", "shared", *(f"Triton {release}" for release in releases)]
    lines = [
        "With each release: instructions; registers of a thread (AMD: with accumulators); bytes that a thread spills.",
        "Shared: bytes of a program, with the first release.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for by_release in found.values():
        one = next(iter(by_release.values()))
        cells = [one["target"], one["purpose"], one["kernel"], f"{one['warps']}, {one['stages']}", f"{one['shared']:,}"]
        for release in releases:
            row = by_release.get(release)
            cells.append(f"{row['instructions']:,}; {row['registers']}; {row['spill_bytes']}" if row else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
