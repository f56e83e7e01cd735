"""Every name of the package that the README and the documentation use is public, and every public name exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import turboattention as ta

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBPACKAGES = {"evaluation"}  # documented, and imported by their full name


def used_names() -> dict[str, str]:
    """Dotted name below `turboattention` -> the page that uses it."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"(?<![\w./-])(?:ta|turboattention)\.([A-Za-z_][\w.]*\w)", text)
        for module, imported in re.findall(r"from turboattention(\.[\w.]+)? import ([\w, ]+)", text):
            names += [f"{module[1:]}.{name.strip()}".lstrip(".") for name in imported.split(",")]
        found |= {name: page.name for name in names if name != "_cpu"}
    return found


USED = used_names()


def test_the_documentation_uses_names():
    assert {"KVCache", "TurboConfig", "paged.paged_attention", "DecodeGraph", "Calibration"} <= set(USED)


@pytest.mark.parametrize("name", sorted(USED))
def test_a_name_in_the_documentation_is_public(name):
    first, *rest = name.split(".")
    if first == "DecodeGraph" or rest[:1] == ["transformers"]:
        pytest.importorskip("triton" if first == "DecodeGraph" else "transformers")
    assert first in ta.__all__ or first in SUBPACKAGES, f"{USED[name]} uses {name}"
    value = importlib.import_module(f"turboattention.{first}") if first in SUBPACKAGES else getattr(ta, first)
    for part in rest:
        if not hasattr(value, part) and hasattr(value, "__path__"):
            importlib.import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)


@pytest.mark.parametrize("name", ta.__all__)
def test_a_public_name_exists(name):
    assert getattr(ta, name) is not None
    assert name in dir(ta)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'KvCache'"):
        _ = ta.KvCache


def test_a_star_import_works_without_triton():
    """`DecodeGraph` needs Triton, which PyTorch does not bring along on every platform."""
    code = "import sys; sys.modules['triton'] = None; from turboattention import *; print(KVCache.__name__)"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == "KVCache\n", run.stderr


def test_paged_exports_what_a_server_uses():
    assert {"BLOCK", "TailBlocks", "PagedBatch", "PagedFormat", "paged_attention"} <= set(ta.paged.__all__)
