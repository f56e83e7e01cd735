"""Attention that a module computes a second time, over other keys than those that a `TurboCache` took, is noticed.

Only keys that `update` returned lead to the cache. Others of the same forward would be attended to without what the
cache holds: right for a prompt, and wrong for every later token. Nothing else tells such a call from one of a forward
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
    """A cache took new keys: calls before this do not count."""
    if not torch.compiler.is_dynamo_compiling():
        _last.forward = None


def other_keys(key: Tensor, in_cache: bool) -> Tensor | None:
    """Remember a call, and return the keys in a cache, if one and the same forward of a module attends both to them and
    to others."""
    forward = _caller()
    same, before, was_in_cache = forward == _last.forward, None if _last.key is None else _last.key(), _last.in_cache
    _last.forward, _last.key, _last.in_cache = forward, weakref.ref(key), in_cache
    if not same or in_cache == was_in_cache:
        return None
    # After `expect_attention`, calls are of one forward. A forward holds its keys until its attention is done: a frame
    # without them is another one at the same place.
    return key if in_cache else before


def _caller() -> int:
    """Which call of a function outside this package called attention."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return id(frame)
