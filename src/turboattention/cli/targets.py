"""Checks that output files can be written, before anything that takes long."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError
from .missing import INSTALL


def check_target(option: str, path: Path | None) -> None:
    """Raises InputError for a file that cannot be written."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{option}: expected a file, got the folder {path}")
    if not folder.is_dir():
        raise InputError(f"{option}: {path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{option}: {path} cannot be written: no permission")


def check_figures(figures: str) -> None:
    """Raises InputError if `figures` ("--out: the report's figures") cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError(f"{figures} need the package matplotlib: {INSTALL}")
