"""Caches in compiled graphs: a graph passes tensors alone, so a tensor that holds a number stands for a cache.

Every cache has a handle, int64 [1] on the CPU, under whose number `cache_of` finds it while it lives. The
operators of `LIBRARY` that read or change a cache take its handle and declare that they change it. None does;
but so `torch.compile` keeps their order, and neither drops nor merges them. Copies of the tensor, which
functionalization makes, stand for the same cache.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .cache import KVCache
    from .contents import Contents

LIBRARY = torch.library.Library("turboattention", "DEF")
"""The operators `torch.ops.turboattention`. Nothing calls them outside of compiled graphs."""

_caches: weakref.WeakValueDictionary[int, Contents] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def new_handle(cache: Contents) -> Tensor:
    """int64 [1] that stands for `cache`, and keeps it from nothing."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number])


def cache_of(handle: Tensor) -> KVCache:
    """The cache that a handle, or a copy of it, stands for. Raises InputError if there is none (any more)."""
    cache = _caches.get(int(handle))
    if cache is None:
        raise InputError(f"handle: expected that of a living KVCache, got {handle.tolist()}")
    return cast("KVCache", cache)


def leave_graph() -> None:
    """While Dynamo traces: end the graph here, because what a cache holds then is old when the graph runs.

    Under `fullgraph=True` that is an error with this message."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break("of a KVCache, compiled code can use seq_lens, append and attention alone")


def _append(handle: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    cache_of(handle).append(k, v, lengths)


def _fake_append(handle: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    pass


def _seq_lens(handle: Tensor, batch_size: int) -> Tensor:
    return cache_of(handle).seq_lens


def _fake_seq_lens(handle: Tensor, batch_size: int) -> Tensor:
    return handle.new_empty(batch_size)


LIBRARY.define("append(Tensor(a!) handle, Tensor k, Tensor v, Tensor? lengths) -> ()")
LIBRARY.define("seq_lens(Tensor(a!) handle, SymInt batch_size) -> Tensor")
LIBRARY.impl("append", _append, "CompositeExplicitAutograd")
LIBRARY.impl("seq_lens", _seq_lens, "CompositeExplicitAutograd")
torch.library.register_fake("turboattention::append", _fake_append, lib=LIBRARY)
torch.library.register_fake("turboattention::seq_lens", _fake_seq_lens, lib=LIBRARY)
