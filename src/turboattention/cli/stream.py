"""Streams text while its tokens are generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

_KEPT = {ord("\n"), ord("\t")}
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in _KEPT}


class TokenText:
    """Converts tokens to pieces of text, and passes them to `write`.

    A single token can be part of a character, or lose its leading space. A short tail is therefore decoded together
    with the new tokens, and text that can still change is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]):
        self._decode, self._write = decode, write
        self._tokens: list[int] = []
        self._start = self._shown = 0

    def add(self, token: int) -> None:
        """Write the text that is final after this token; nothing if it ends inside a character."""
        self._tokens.append(token)
        before, after = self._tail()
        if after.endswith("�") or len(after) <= len(before):
            return
        self._start, self._shown = self._shown, len(self._tokens)
        self._write(after[len(before) :])

    def finish(self) -> None:
        """Write the text that was held back."""
        before, after = self._tail()
        if len(after) > len(before):
            self._write(after[len(before) :])

    def _tail(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._start : self._shown]), self._decode(self._tokens[self._start :])


def printable(text: str) -> str:
    """The text without control characters."""
    return text.translate(_CONTROL)


def write_text(text: str) -> None:
    """Write a piece of text to stdout and flush; control characters are removed for a terminal."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
