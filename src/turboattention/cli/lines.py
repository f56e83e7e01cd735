"""Lines that people type, or that another program writes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..errors import InputError
from .descriptors import check_input
from .output import note
from .prompt import check_text


class Lines:
    """Lines from stdin that are not blank, up to its end. Someone at a terminal is prompted, and Ctrl-C drops the line.

    Args:
        option: what to call stdin in errors.
        prompt: shown at a terminal.
    """

    def __init__(self, option: str, prompt: str):
        check_input(option)
        self._option, self._prompt = option, prompt
        self.typed = sys.stdin.isatty()

    def __iter__(self) -> Iterator[str]:
        while (line := self._typed() if self.typed else self._piped()) is not None:
            if line.strip():
                check_text(self._option, line)
                yield line.strip()

    def _typed(self) -> str | None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` then edits lines and remembers them)
        if not sys.stdout.isatty():  # `input` would write the prompt into the results
            sys.stderr.write(self._prompt)
            sys.stderr.flush()
        try:
            return input(self._prompt if sys.stdout.isatty() else "")
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            note("Ctrl-D ends the program")
            return ""

    def _piped(self) -> str | None:
        line = sys.stdin.buffer.readline()
        if not line:
            return None
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._option}: expected UTF-8 text, got other bytes") from error
