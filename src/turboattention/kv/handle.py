"""Handles: tensors that represent caches in compiled graphs, which can only pass tensors.

A handle is int64 [1] on the CPU and holds a number; `cache_of` returns the cache with that number while it is alive.
The operators of `LIBRARY` that read or modify a cache take its handle and declare it as mutated. They do not write to
the handle; the declaration makes `torch.compile` preserve their order, and prevents it from removing or merging them.
Copies of the tensor, such as those made by functionalization, refer to the same cache.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .cache import KVCache

LIBRARY = torch.library.Library("turboattention", "DEF")
"""The operators `torch.ops.turboattention`. They are only called from compiled graphs."""

_caches: weakref.WeakValueDictionary[int, KVCache] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def new_handle(cache: KVCache) -> Tensor:
    """A new handle of `cache`, int64 [1]. It does not keep the cache alive."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number])


def cache_of(handle: Tensor) -> KVCache:
    """The cache that a handle, or a copy of it, refers to. Raises InputError if that cache no longer exists."""
    cache = _caches.get(int(handle))
    if cache is None:
        raise InputError(f"handle: expected the handle of a live KVCache, got {handle.tolist()}")
    return cache


def leave_graph() -> None:
    """Break the graph here while Dynamo traces: the graph would reuse cache contents as of tracing.

    Under `fullgraph=True` this is an error with the message below.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break("of a KVCache, compiled code can use seq_lens, append and attention only")


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
