"""Writes measured figures into the documentation: `python benchmarks/report.py`, with --check to only compare.

Reads benchmarks/results/cpu, where a processor has one file or a folder of files, and replaces the text between the
markers of README.md and docs/performance.md. Plots are written to docs/ as PNG. No figure is entered by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tables import OTHER_ISAS, Result, full, result_of, summary

from turboattention.cli.bench_files import write_plot
from turboattention.cli.bench_view import facts_line
from turboattention.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
PAGES = {"README.md": summary, "docs/performance.md": full}
DRAWN = ("sdpa", "sdpa-folded", "sdpa-bf16", "ggml-f16", "ggml-q8_0", "ggml-q4_0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from the files")
    check = parser.parse_args().check
    results = load(RESULTS)
    stale = [name for name in PAGES if not update(ROOT, name, results, check=check)]
    if check:
        print("\n".join(f"{name}: differs from benchmarks/results; run python benchmarks/report.py" for name in stale))
        return 1 if stale else 0
    for path in draw(results, ROOT / "docs"):
        print(path)
    return 0


def load(folder: Path) -> list[Result]:
    """The results under `folder`/cpu, the processor measured last first; those of one processor by file name."""
    paths = sorted((folder / "cpu").glob("*.json")) + sorted((folder / "cpu").glob("*/*.json"))
    found = [result_of(folder, path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    latest: dict[str, str] = {}
    for result in found:
        latest[result.processor] = max(latest.get(result.processor, ""), result.facts.get("time", ""))
    # Stable: files keep their order.
    return sorted(found, key=lambda result: (latest[result.processor], result.processor), reverse=True)


def section(name: str, results: Sequence[Result]) -> str:
    """The text between the markers of a page."""
    up = "../" * name.count("/")
    text = PAGES[name](results).replace("(RESULTS/", f"({up}benchmarks/results/")
    text = "\n\n".join(map(_wrapped, text.split("\n\n")))
    return f"{BEGIN}\n{text}\n{END}"


def _wrapped(paragraph: str) -> str:
    """In lines of at most 120 columns, except tables."""
    if paragraph.startswith("|"):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def current(text: str) -> str | None:
    """The current section, including its markers; None for a page without them."""
    begin, end = text.find(BEGIN), text.find(END)
    return text[begin : end + len(END)] if 0 <= begin < end else None


def update(root: Path, name: str, results: Sequence[Result], *, check: bool) -> bool:
    """Whether the page is up to date; otherwise update it, unless `check`."""
    page = root / name
    text = page.read_text(encoding="utf-8")
    old, new = current(text), section(name, results)
    if old is None or old == new:
        return True
    if not check:
        write_text(page, text.replace(old, new))
    return False


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """One plot a file of the processor measured last: causal prefill and INT4 decode at head_dim 128."""
    drawn = []
    for result in results:
        if result.place.stem.startswith(OTHER_ISAS) or result.processor != results[0].processor:
            continue
        rows = [
            replace(row, rivals=[rival for rival in row.rivals if rival.peer in DRAWN])
            for row in result.rows
            if row.shape["head_dim"] == 128
            and ((row.work == "prefill" and row.shape["causal"]) or (row.work == "decode" and row.bits == "4 bits"))
        ]
        path = folder / f"performance-{result.place.stem}.png"
        if write_plot(path, rows, facts_line(result.facts)):
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
