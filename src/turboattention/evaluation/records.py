"""Results as they are kept: one JSON file for each method and task, so that a run goes on where it was ended."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError
from ..files import write_text

VERSION = 1


def fingerprint(text: str | bytes) -> str:
    """Eight hex digits that tell other contents apart from these; no protection against forgery."""
    return f"{zlib.crc32(text.encode() if isinstance(text, str) else text):08x}"


class Records:
    """The folder `units` in `folder`; without one nothing is kept.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder and folder / "units"
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--out: {folder} cannot be made: {error.strerror}") from error

    def find(self, method: str, task: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The unit of a method and task, if it was measured with these settings.

        Raises:
            FormatError: its file is no unit.
        """
        path = self._path(method, task)
        if path is None or not path.exists():
            return None
        try:
            unit = json.loads(path.read_text(encoding="utf-8"))
            same = unit["version"] == VERSION and unit["settings"] == settings
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"--out: {path} is damaged ({error}); remove it to measure it again") from error
        return unit if same else None

    def keep(self, unit: dict[str, Any]) -> None:
        """Write a unit, whole or not at all."""
        path = self._path(unit["method"], unit["task"])
        if path is not None:
            write_whole(path, json.dumps(unit, indent=1) + "\n")

    def _path(self, method: str, task: str) -> Path | None:
        name = f"{method}--{task}".replace("/", "-")
        return self._folder and self._folder / f"{name}.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    write_text(path, text)
