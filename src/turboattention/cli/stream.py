"""Text that appears as its tokens do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

_KEPT = {ord("\n"), ord("\t")}
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in _KEPT}


class TokenText:
    """Turns tokens into pieces of text, and hands them to `write`.

    A token alone may be half a character, or lose its leading space, so a short tail is decoded
    together with the new ones, and what could still change is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]):
        self._decode, self._write = decode, write
        self._tokens: list[int] = []
        self._start = self._shown = 0

    def add(self, token: int) -> None:
        """Writes what this token settles; nothing where it ends inside a character."""
        self._tokens.append(token)
        before, after = self._tail()
        if after.endswith("�") or len(after) <= len(before):
            return
        self._start, self._shown = self._shown, len(self._tokens)
        self._write(after[len(before) :])

    def finish(self) -> None:
        """Writes what was held back."""
        before, after = self._tail()
        if len(after) > len(before):
            self._write(after[len(before) :])

    def _tail(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._start : self._shown]), self._decode(self._tokens[self._start :])


def printable(text: str) -> str:
    """Without the control characters that would steer a terminal."""
    return text.translate(_CONTROL)


def write_text(text: str) -> None:
    """A piece of text on stdout, now; a terminal gets nothing that would steer it."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
