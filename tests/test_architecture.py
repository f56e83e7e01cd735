"""docs/architecture.md names files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
REFERENCES = sorted(set(re.findall(r"`([\w./]+\.(?:py|h|cpp|inc))(?:: ([\w, ]+))?`", TEXT)))
FOLDERS = sorted(set(re.findall(r"`([\w./]+/)`", TEXT)))


def located(path: str) -> Path:
    """The file or folder, below the repository's root or the package."""
    found = [root / path for root in (ROOT, ROOT / "src" / "turboattention") if (root / path).exists()]
    assert found, f"docs/architecture.md: {path} does not exist"
    return found[0]


def test_the_page_has_references():
    assert len(REFERENCES) > 60


@pytest.mark.parametrize("path, names", [r for r in REFERENCES if "NAME" not in r[0]])
def test_a_reference_exists(path, names):
    text = located(path).read_text(encoding="utf-8")
    for name in filter(None, names.split(", ")):
        defined = rf"(?:def|class|struct|inline \w+|int|void|NonFinite) {name}\b|^{name}\b.*="
        assert re.search(defined, text, re.MULTILINE), f"docs/architecture.md: {path} does not define {name}"


@pytest.mark.parametrize("path", FOLDERS)
def test_a_folder_exists(path):
    assert located(path).is_dir()


def test_every_folder_of_the_package_is_on_the_map():
    package = ROOT / "src" / "turboattention"
    on_the_map = set(re.findall(r"`(\w+)(?:/\w+)?/`", TEXT))
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders <= on_the_map
