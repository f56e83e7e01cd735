"""Saved results: one JSON file (unit) per method and task, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError
from ..files import append_text, new_folder, parse_json, read_json, read_text, write_text

VERSION = 1


def fingerprint(text: str | bytes) -> str:
    """A checksum of eight hex digits (CRC-32), not secure against forgery."""
    return f"{zlib.crc32(text.encode() if isinstance(text, str) else text):08x}"


class Records:
    """The folder `units` in `folder`, which the first unit creates; with None nothing is saved.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder and folder / "units"
        if self._folder is not None:
            _check_folder(self._folder)

    def find(self, method: str, task: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The unit of a method and task, if it was measured with these settings.

        Raises:
            FormatError: its file is damaged.
        """
        path = self._path(method, task)
        if path is None or not path.exists():
            return None
        try:
            unit = read_json(path)
            same = unit["version"] == VERSION and unit["settings"] == settings
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"--out: {path} is damaged ({error}); remove it to measure it again") from error
        return unit if same else None

    def keep(self, unit: dict[str, Any]) -> None:
        """Write a unit atomically."""
        path = self._path(unit["method"], unit["task"])
        if path is not None:
            write_whole(path, json.dumps(unit, indent=1) + "\n")

    def parts(self, task: str, settings: Mapping[str, dict[str, Any]]) -> Parts:
        """The saved parts of a task's incomplete units; `settings` by method, as in `find`."""
        paths = {method: self._path(method, task, ".part.jsonl") for method in settings}
        return Parts({method: Part(paths[method], settings[method]) for method in settings})

    def _path(self, method: str, task: str, suffix: str = ".json") -> Path | None:
        name = f"{method}--{task}".replace("/", "-")
        return self._folder and self._folder / f"{name}{suffix}"


class Parts:
    """Parts of a task's incomplete units by method and key (a passage, a question), saved as they are added."""

    def __init__(self, parts: Mapping[str, Part]):
        self._parts = parts

    def get(self, method: str, key: str) -> Any:
        """The JSON value, or None."""
        return self._parts[method].values.get(key)

    def put(self, method: str, key: str, value: Any) -> None:
        self._parts[method].put(key, value)

    def drop(self, method: str) -> None:
        """Delete the parts of a method, when its unit is complete."""
        self._parts[method].drop()


class Part:
    """A file of JSON lines: first the settings, then a key and a value per line."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path, self._head = path, {"version": VERSION, "settings": settings}
        self.values: dict[str, Any] = {}
        # Truncated lines, and parts with other settings, are discarded and measured again.
        lines = list(_json_lines(path)) if path is not None and path.exists() else []
        if lines and lines[0] == self._head:
            self.values = dict(lines[1:])
        self._is_whole = False

    def put(self, key: str, value: Any) -> None:
        self.values[key] = value
        if self._path is None:
            return
        if self._is_whole:
            self._is_whole = False  # a full disk can cut the line
            append_text(self._path, json.dumps([key, value]) + "\n", "--out")
        else:  # the existing file may end with a truncated line
            lines = [self._head, *self.values.items()]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._is_whole = True

    def drop(self) -> None:
        self.values = {}
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    """Raises InputError, before anything that takes long, for a folder that cannot be created or written to."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise InputError(f"--out: {folder.parent} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out: {folder.parent} cannot be made: no permission")


def _json_lines(path: Path) -> Iterator[Any]:
    """The lines up to the first one that is not valid JSON. Raises `FormatError` if the file cannot be read."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"--out: {path} is damaged ({error}); remove it to measure it again") from error
    for line in text.splitlines():
        try:
            yield parse_json(line)
        except ValueError:
            return


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, in a folder that is created if it does not exist."""
    with new_folder(path.parent, "--out"):
        write_text(path, text, "--out")
