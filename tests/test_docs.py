"""Pages of documentation: lines of prose fit into 120 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.md")])
COLUMNS = 120
MARKER = re.compile(r"^<!-- (\w+):(begin|end) -->$")


def prose(text: str) -> list[tuple[int, str]]:
    """Line numbers and lines, without tables, code blocks, links that cannot be broken, and sections that a script
    writes between `<!-- name:begin -->` and `<!-- name:end -->`."""
    found, fenced, written = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        if marker := MARKER.match(line):
            written = marker.group(2) == "begin"
        elif line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not written and not line.startswith(("|", "    ")) and " " in line.strip():
            found.append((number, line))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_fits_into_120_columns(page):
    wide = [f"line {number}: {len(line)}" for number, line in prose(page.read_text("utf-8")) if len(line) > COLUMNS]
    assert not wide


def test_what_counts_as_prose():
    written, code = "<!-- a:begin -->\nby a script\n<!-- a:end -->\n", "```\nsome code\n```\n    more code\n"
    assert prose(f"{written}one line\n| a | table |\n{code}another one\n") == [(4, "one line"), (10, "another one")]
    assert len(PAGES) > 12
