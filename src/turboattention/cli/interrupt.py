"""Ctrl-C that ends an answer, but not the program."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Inside the `with` block, Ctrl-C ends a started text after its current token.

    After a token all layers of the cache have the same tokens, so the answer so far remains valid. A second Ctrl-C, or
    one before the first token, raises KeyboardInterrupt immediately.
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
        """Called after every token."""
        self.begun = True
        return self.asked
