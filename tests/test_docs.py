"""Pages of documentation: lines of prose fit into 120 columns."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.md")])
COLUMNS = 120


def prose(text: str) -> list[tuple[int, str]]:
    """Line numbers and lines, without tables, code blocks and links that cannot be broken. Sections that a script
    writes are included."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ")) and " " in line.strip():
            found.append((number, line))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_fits_into_120_columns(page):
    wide = [f"line {number}: {len(line)}" for number, line in prose(page.read_text("utf-8")) if len(line) > COLUMNS]
    assert not wide


def test_what_counts_as_prose():
    code = "```\nsome code\n```\n    more code\n"
    assert prose(f"one line\n| a | table |\n{code}another one\n") == [(1, "one line"), (7, "another one")]
    assert len(PAGES) > 12
