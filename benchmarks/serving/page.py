"""Writes the measured part of docs/serving.md from benchmarks/results/serving-*.json, and its pictures.

`page.py --table`; `--check` fails if the page differs. Needs matplotlib for the pictures, but not vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import models_section
import pictures
import sections
import throughput_section

from turboattention.files import write_figure, write_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- serving:begin -->", "<!-- serving:end -->"
PARTS = {
    "serving-capacity": (sections.capacity, pictures.capacity),
    "serving-capacity-gpu": (sections.capacity, pictures.capacity),
    "serving-models": (models_section.models, None),
    "serving-throughput": (throughput_section.throughput, pictures.throughput),
    "serving-throughput-gpu": (throughput_section.throughput, pictures.throughput),
    "serving-throughput-smollm2": (throughput_section.throughput, pictures.real_model),
    "serving-throughput-qwen": (throughput_section.throughput, pictures.real_model),
    "serving-soak": (sections.soak, None),
    "serving-soak-drafts": (sections.soak, None),
    "serving-soak-drafts-model": (sections.soak, None),
}
"""A file of results, its section, and its picture."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page and its pictures")
    parser.add_argument("--check", action="store_true", help="fail if the page differs")
    options = parser.parse_args()
    if options.table == options.check:
        parser.error("expected one of --table and --check")
    text = PAGE.read_text(encoding="utf-8")
    new = with_section(text, section(RESULTS))
    if options.check:
        print("" if text == new else f"{PAGE.name} differs from its results; run benchmarks/serving/page.py --table")
        return int(text != new)
    write_text(PAGE, new)
    for name, document in documents(RESULTS).items():
        draw = PARTS[name][1]
        if draw is not None:
            write_figure(PAGE.with_name(f"{name}.png"), draw(document))
    return 0


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    """The existing files of results; those on throughput of real models include `quality`, from another file."""
    found = {name: _read(folder, name) for name in PARTS}
    for name, document in found.items():
        if document and "-throughput-" in name:
            document["quality"] = _read(folder, name.replace("throughput", "quality"))
    return {name: document for name, document in found.items() if document}


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Empty if there is no such file."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def section(folder: Path) -> str:
    parts = [PARTS[name][0](document, name) for name, document in documents(folder).items()]
    paragraphs = "\n\n".join(parts).split("\n\n")
    return "\n\n".join(map(_wrapped, paragraphs)) or "Nothing has been measured yet."


def _wrapped(paragraph: str) -> str:
    """In lines of at most 120 columns, except tables, lists and pictures."""
    if paragraph.startswith(("|", "- ", "!")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def with_section(text: str, section: str) -> str:
    """Raises ValueError for a page without the markers."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE.name}: expected {BEGIN} and {END}, got a page without them")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(main())
