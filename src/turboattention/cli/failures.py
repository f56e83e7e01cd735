"""Errors of commands: one line on stderr, and an exit code.

2 for invalid options, files and models, 1 for internal errors, 130 for Ctrl-C.
``TURBOATTENTION_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import TurboError
from .missing import INSTALL, missing_package
from .naming import for_command

DEBUG = "TURBOATTENTION_DEBUG"


class CleanGroup(TyperGroup):
    """A group of commands whose errors are one line."""

    _command: Any = None

    def resolve_command(self, *args: Any, **extra: Any) -> Any:
        found = super().resolve_command(*args, **extra)
        self._command = found[1]
        return found

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if os.environ.get(DEBUG, "") not in ("", "0") and not _is_usage(error):
                raise
            message, code = describe(error)
            message = for_command(message, self._command) if isinstance(error, TurboError) else message
            # File names that are not valid text are escaped.
            line = " ".join(f"error: {message}".split()).encode("utf-8", "backslashreplace").decode()
            typer.echo(line, err=True)
        sys.exit(code if isinstance(code, int) else 0)


def describe(error: Exception) -> tuple[str, int]:
    """The message of an error, and the exit code."""
    if isinstance(error, TurboError):
        return str(error), 2
    if _is_usage(error):
        # typer checks choices by pydantic, whose messages begin with the kind of error.
        return error.format_message().replace("Value error, ", ""), 2  # type: ignore[attr-defined]
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if isinstance(error, ModuleNotFoundError) and (package := missing_package(error)):
        return f"this command needs the package {package}: {INSTALL}", 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:  # writing to a pipe
        return "stdout: cannot be written: no space left on the device", 2
    return f"{type(error).__name__}: {error} ({DEBUG}=1 shows where)", 1


def _is_usage(error: Exception) -> bool:
    """Whether it is a click error, such as a wrong option. Releases of typer include click under different names."""
    return hasattr(error, "format_message")
