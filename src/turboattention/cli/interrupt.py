"""Ctrl-C that ends an answer, and not the program."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While it is entered, Ctrl-C ends a text that has begun behind its current token, and all else at once.

    Between tokens a cache holds whole tokens in all of its layers, so what was said stays good; a second Ctrl-C, or one
    before the first token, raises KeyboardInterrupt wherever the program is.
    """

    def __init__(self) -> None:
        self.begun = self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _take(self, _: int, __: FrameType | None) -> None:
        if self.asked or not self.begun:
            raise KeyboardInterrupt
        self.asked = True

    def enough(self) -> bool:
        """Asked behind every token."""
        self.begun = True
        return self.asked
