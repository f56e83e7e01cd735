"""The table of sliding windows, crops and selections in README equals the script's, and is within the stated bound."""

from __future__ import annotations

from ..scripts import benchmark_script


def test_readme_has_what_the_script_gives():
    with benchmark_script("sliding_memory.py") as script:
        rows = script.rows()
        assert script.BEGIN + script.table(rows) + script.END in script.README.read_text(encoding="utf-8")
    assert all(held <= 1.1 * anew and held < before / 7 for _, before, held, anew in rows)
    assert len({held for name, _, held, _ in rows if name.startswith("window")}) == 1
