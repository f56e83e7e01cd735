"""The table of sliding windows, crops and selections: README's is what the script gives, and within its promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/sliding_memory.py"


def test_readme_has_what_the_script_gives():
    spec = importlib.util.spec_from_file_location("sliding_memory", SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = script.rows()
    assert script.BEGIN + script.table(rows) + script.END in script.README.read_text(encoding="utf-8")
    assert all(held <= 1.1 * anew and held < before / 7 for _, before, held, anew in rows)
    assert len({held for name, _, held, _ in rows if name.startswith("window")}) == 1
