"""Detects a module that computes attention a second time, over keys other than those in the `TurboCache`.

Only keys returned by `update` are linked to the cache. Attention over other keys of the same forward pass would ignore
the cached tokens: correct for a prompt, but wrong for every later token. Such a call looks like one of a forward pass
without a cache, so the last call of each thread is remembered.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

_PACKAGE = f"{__name__.partition('.')[0]}."


class _Last(threading.local):
    """forward: the `id` of the frame that called attention; key: a weak reference to the call's; in_cache: whether a
    cache holds its keys."""

    forward: int | None = None
    key: Any = None
    in_cache = False


_last = _Last()


def expect_attention() -> None:
    """A cache received new keys: earlier calls are ignored."""
    if not torch.compiler.is_dynamo_compiling():
        _last.forward = None


def other_keys(key: Tensor, in_cache: bool) -> Tensor | None:
    """Remember a call, and return the keys in a cache if the same forward pass of a module attends both to them and to
    others."""
    forward = _caller()
    same, before, was_in_cache = forward == _last.forward, None if _last.key is None else _last.key(), _last.in_cache
    _last.forward, _last.key, _last.in_cache = forward, weakref.ref(key), in_cache
    if not same or in_cache == was_in_cache:
        return None
    # After `expect_attention`, calls belong to one forward pass. It holds its keys until its attention is done, so a
    # frame without them is a different one with the same id.
    return key if in_cache else before


def _caller() -> int:
    """The frame of the function outside this package that called attention."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return id(frame)
