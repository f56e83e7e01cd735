"""What an iteration of each loop of a kernel takes, compiled without a GPU. For decode's loop over 4-bit pages:

    PYTHONPATH=src python3 benchmarks/gpu/loop_counts.py "decode d128 int4, group 4" --kernel decode

The name is of a call of kernels.py, whose loops over pages are those with products: instructions, copies to shared
memory, other loads from global memory, and waits (barriers and waits for copies).

`--record now` puts the counts of decode's loop over packed pages, with this release of Triton, into
benchmarks/results/gpu-loops.json; `--write` puts them from there into docs/gpu.md. What is there as "before" was
recorded by this program within the sources of the commit that the file names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiling import Assembly

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu-loops.json"
BEGIN, END = "<!-- loops:begin -->", "<!-- loops:end -->"
COUNTED = {
    "products": ("IGMMA", "IMMA", "v_mfma"),
    "copies": ("LDGSTS",),
    "global loads": ("LDG", "global_load", "buffer_load"),
    "waits": ("BAR", "DEPBAR", "s_barrier"),
    "spilled words read": ("LDL", "scratch_load"),
}
WIDTHS, ROWS = (4, 3, 2), (4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", nargs="?", help="name of a call of kernels.py")
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "gfx942"))
    parser.add_argument("--kernel", default="", help="only this kernel")
    parser.add_argument("--record", metavar="WHEN", help="count decode's loop over packed pages: now, or before")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write docs/gpu.md from the results")
    options = parser.parse_args()
    if options.write:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: interpreted kernels cannot be compiled")
    import kernels
    import torch
    import triton
    from compiling import cross_compiling

    if options.record:
        record(options.record, options.target, options.results)
        return
    calls = dict(kernels.calls())
    if options.call not in calls:
        parser.error(f"expected a call of {'; '.join(calls)}, got {options.call}")
    with torch.inference_mode(), cross_compiling(options.target) as compiled:
        calls[options.call]()
    print(f"Triton {triton.__version__}, {options.target}: {options.call}")
    for kernel in compiled:
        if options.kernel not in ("", kernel.kernel):
            continue
        print(f"{kernel.kernel}: {kernel.instructions} instructions, {kernel.spill_bytes} bytes spilled")
        for start, end in kernel.loops:
            said = ", ".join(f"{count} {what}" for what, count in counts(kernel.code[start : end + 1]).items())
            print(f"  loop of {end - start + 1} instructions: {said}")


def written(page: str, rows: list[dict[str, Any]]) -> str:
    """docs/gpu.md with the table of these rows."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def record(when: str, target: str, path: Path) -> None:
    """Put the counts of decode's loop over packed pages at head_dim 128 into a file, instead of those that it has for
    the same sources, release and target."""
    import kernels
    import torch
    import triton
    from compiling import cross_compiling

    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    what = {"when": when, "triton": triton.__version__, "target": target}
    rows = [row for row in held["rows"] if {name: row[name] for name in what} != what]
    for group, bits in itertools.product(ROWS, WIDTHS):
        with torch.inference_mode(), cross_compiling(target) as compiled:
            kernels._decode(kernels.CONFIG, 128, (bits,) * kernels.KV_HEADS, group)()
        (kernel,) = (kernel for kernel in compiled if kernel.kernel == "decode")
        rows.append({**what, "bits": bits, "rows": group, **page_loop(kernel), "spilled bytes": kernel.spill_bytes})
    held["rows"] = sorted(rows, key=lambda row: (row["when"], row["triton"], row["target"], row["rows"], -row["bits"]))
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def page_loop(kernel: Assembly) -> dict[str, int]:
    """Per page and head, by all warps: counts of the innermost loop that copies pages ahead."""
    inner = [(a, b) for a, b in kernel.loops if not any(a < end < b for _, end in kernel.loops)]
    found = [kernel.code[a : b + 1] for a, b in inner]
    (code,) = (code for code in found if counts(code)["copies"])
    return {name: count * kernel.warps for name, count in ({"instructions": len(code)} | counts(code)).items()}


def counts(code: list[str]) -> dict[str, int]:
    names = Counter(_kind(name) for name in code)
    return {what: sum(names[name] for name in which) for what, which in COUNTED.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Instructions, and in brackets copies, waits and spilled bytes, of every width and number of rows."""
    releases = sorted({row["triton"] for row in rows})
    columns = list(itertools.product(releases, ("before", "now")))
    lines = [
        f"| rows | {' | '.join(f'{when}, {release}' for release, when in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    by = {(row["triton"], row["when"], row["rows"], row["bits"]): row for row in rows}
    for group, bits in itertools.product(ROWS, WIDTHS):
        cells = [_cell(by.get((release, when, group, bits))) for release, when in columns]
        lines.append(f"| {bits} bits, {group} rows | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not compiled"
    return f"{row['instructions']:,} ({row['copies']}, {row['waits']}, {row['spilled bytes']})"


def _kind(instruction: str) -> str:
    """Its name without what says of which width or form it is: NVIDIA's up to a dot, of AMD's the first two words."""
    return "_".join(instruction.split(".")[0].split("_")[:2])


if __name__ == "__main__":
    main()
