"""Handling of a closed stdin, stdout or stderr (``<&-``): reported when the stream is needed, and its descriptor is
never reused for another file. If stderr cannot be written (a full disk, a broken pipe), only messages are lost."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from ..errors import InputError


class _Lossy(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def settle() -> None:
    """Occupy the descriptors of closed streams: files opened later would get them, and the output of any library would
    go into these files. Messages are dropped if stderr is closed or cannot be written."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the program runs)
    elif sys.stderr is sys.__stderr__:  # not a test's
        lossy = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "wb", closefd=False))
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        sys.stderr = io.TextIOWrapper(lossy, encoding, errors, line_buffering=True)


def check_results() -> None:
    """Raises InputError if there is no stdout for results."""
    if sys.stdout is None:
        raise InputError("stdout: expected an open stream for results, got a closed one (>/dev/null discards them)")


def check_input(option: str) -> None:
    """Raises InputError if there is no stdin for `option` to read."""
    if sys.stdin is None:
        raise InputError(f"{option}: expected text on stdin, got a closed stream")
