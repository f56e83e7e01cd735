"""Attention that a module computes a second time, over other keys than those that a `TurboCache` took, is noticed.

Only keys that `update` returned lead to the cache. Others of the same forward would be attended to without what the
cache holds: right for a prompt, and wrong for every later token. Nothing else tells such a call from one of a forward
without a cache, so the last call of each thread is remembered.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class _Last(threading.local):
    """module, key: weak references of the last attention call; in_cache: whether a cache holds its keys."""

    module: Any = None
    key: Any = None
    in_cache = False


_last = _Last()


def expect_attention() -> None:
    """A cache took new keys: calls before this do not count."""
    if not torch.compiler.is_dynamo_compiling():
        _last.module = None


def other_keys(module: nn.Module, key: Tensor, in_cache: bool) -> Tensor | None:
    """Remember a call, and return the keys in a cache, if `module` attends both to them and to others."""
    same = _last.module is not None and _last.module() is module
    before, was_in_cache = None if _last.key is None else _last.key(), _last.in_cache
    _last.module, _last.key, _last.in_cache = weakref.ref(module), weakref.ref(key), in_cache
    if not same or in_cache == was_in_cache:
        return None
    if in_cache:
        return key
    # A model holds its keys until its attention is done, so those of an earlier forward are gone.
    return before if before is not None and before.shape == key.shape else None
