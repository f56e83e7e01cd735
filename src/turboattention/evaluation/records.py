"""Results as they are kept: one JSON file for each method and task, so that a run goes on where it was ended."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
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

    def parts(self, task: str, settings: Mapping[str, dict[str, Any]]) -> Parts:
        """What is there of a task's units; `settings` by method, as `find` takes them."""
        paths = {method: self._path(method, task, ".part.jsonl") for method in settings}
        return Parts({method: Part(paths[method], settings[method]) for method in settings})

    def _path(self, method: str, task: str, suffix: str = ".json") -> Path | None:
        name = f"{method}--{task}".replace("/", "-")
        return self._folder and self._folder / f"{name}{suffix}"


class Parts:
    """Pieces of a task's units that are not complete, by method and key: a passage, a question. Kept as they come."""

    def __init__(self, parts: Mapping[str, Part]):
        self._parts = parts

    def get(self, method: str, key: str) -> Any:
        """JSON, or None."""
        return self._parts[method].values.get(key)

    def put(self, method: str, key: str, value: Any) -> None:
        self._parts[method].put(key, value)

    def drop(self, method: str) -> None:
        """The unit is complete."""
        self._parts[method].drop()


class Part:
    """A file of JSON lines: the settings, then a key and a value in each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path, self._head = path, {"version": VERSION, "settings": settings}
        self.values: dict[str, Any] = {}
        # A line that a kill cut short, and everything under other settings, is measured again.
        lines = list(_json_lines(path)) if path is not None and path.exists() else []
        if lines and lines[0] == self._head:
            self.values = dict(lines[1:])
        self._is_whole = False

    def put(self, key: str, value: Any) -> None:
        self.values[key] = value
        if self._path is None:
            return
        if self._is_whole:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")
        else:  # what was there before may end in half a line
            lines = [self._head, *self.values.items()]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in lines))
            self._is_whole = True

    def drop(self) -> None:
        self.values = {}
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _json_lines(path: Path) -> Iterator[Any]:
    """Up to the first line that is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    write_text(path, text)
