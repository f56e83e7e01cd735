"""Lines that people type, or that another program writes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from ..errors import InputError, TurboError
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
        return self

    def __next__(self) -> str:
        """Raises InputError for a line that is not text; the next call gives the next line."""
        while (line := self._typed() if self.typed else self._piped()) is not None:
            if line.strip():
                check_text(self._option, line)
                return line.strip()
        raise StopIteration

    def each(self, take: Callable[[str], bool | None]) -> bool:
        """Call `take` with every line, or until it returns True. An error of this package is printed on stderr, and the
        next line follows. Returns whether a line failed that was not typed at a terminal, where the user sees the
        error."""
        failed, ended = False, False
        while not ended:
            try:
                line = next(self, None)
                ended = line is None or take(line) is True
            except TurboError as error:
                note(" ".join(str(error).split()), "error")
                failed = not self.typed
        return failed

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
