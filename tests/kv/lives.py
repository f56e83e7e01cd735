"""Sequences of operations on a cache, for tests with threads and processes."""

from __future__ import annotations

import copy
from pathlib import Path

import turboattention as ta
from turboattention.kv.serialization import _digest, cache_tensors

from .tools import PLAIN, tokens

Step = tuple[str, int]


def born(length: int, window: int | None, most: int | None) -> ta.KVCache:
    cache = ta.KVCache(2, 1, 16, config=PLAIN, window_size=window, max_tokens=most)
    cache.append(*tokens(2, 1, length, 16))
    return cache


def state(cache: ta.KVCache) -> str:
    """A digest of its content."""
    return _digest("", cache_tensors(cache, ""))


def live(cache: ta.KVCache, steps: list[Step], path: Path, others_save: bool = False) -> str:
    """The state at the end. What is saved carries its state in its label, so that whoever loads it can tell that it is
    whole; `others_save` where it may be another's."""
    for kind, number in steps:
        if kind == "append":
            cache.append(*tokens(2, 1, number, 16, seed=number))
        elif kind == "crop":
            cache.crop((cache.seq_lens - number).clamp(min=0))
        elif kind in ("clone", "copy", "deepcopy"):
            old = cache
            cache = cache.clone() if kind == "clone" else getattr(copy, kind)(cache)
            old.append(*tokens(2, 1, 1 + number, 16, seed=1))  # which must not show in the copy
        elif kind == "save":
            cache.label = state(cache)
            cache.save(path)
        elif kind == "load" and path.exists():
            loaded = ta.KVCache.load(path)
            assert state(loaded) == loaded.label, "a damaged file was loaded"
            cache = loaded if others_save or loaded.label == state(cache) else cache
    return state(cache)


def in_process(length: int, window: int | None, steps: list[Step], path: str) -> str:
    return live(born(length, window, None), steps, Path(path), others_save=True)
