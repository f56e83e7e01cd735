"""Bytes: all of them counted, few of them idle, none of them moved."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta

from .tools import PLAIN, filled, tokens

OF_KERNELS = ("kept", "_addresses")
"""What `nbytes` leaves out: where pages stand, and what steps share."""


def tensors_of(thing: object, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        inner = [*thing.values()]
    elif isinstance(thing, (list, tuple, set)):
        inner = [*thing]
    elif type(thing).__module__.startswith("turboattention"):
        inner = [value for name, value in vars(thing).items() if name not in OF_KERNELS]
    else:
        return []
    return [x for part in inner for x in tensors_of(part, seen)]


def counted(cache: ta.KVCache) -> int:
    """Bytes of every storage that the cache keeps alive."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache, set())}
    return sum(storages.values())


OPTIONS = {
    "default": {},
    "paper": {"config": ta.TurboConfig.paper()},
    "mixed": {"config": PLAIN.replace(bits="mixed")},
    "given widths": {"head_bits": [[4, 2], [8, 3]]},
    "given mean": {"k_mean": torch.ones(2, 16)},
    "window": {"window_size": 70},
    "reserved": {"max_tokens": 1000},
    "lag": {"config": PLAIN.replace(flush_lag=40)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nbytes_counts_every_tensor(options):
    cache = ta.KVCache(2, 2, 16, **{"config": PLAIN, **options})
    assert cache.nbytes == counted(cache)
    for count in (1, 62, 1, 1, 63, 200):
        cache.append(*tokens(2, 2, count, 16))
        assert cache.nbytes == counted(cache)
    cache.crop(270)
    assert cache.nbytes == counted(cache)
    cache.reorder(torch.tensor([0, 0, 1]))
    assert cache.nbytes == counted(cache)


def test_bits_per_element():
    cache, *_ = filled([200, 100])
    assert cache.bits_per_element == cache.nbytes * 8 / (2 * 300 * 2 * 16)


@pytest.mark.parametrize("bits, floor", [(4, 3.6), (3, 4.4), ("mixed", 4.4), (2, 6.5)])
@pytest.mark.parametrize("length", [8192, 8192 + 63])
def test_memory_floor_below_fp16(bits, floor, length):
    """head_dim 128, 8k tokens, buffer and sinks included (search does not change a byte's place)."""
    heads = 2
    cache = ta.KVCache(1, heads, 128, config=PLAIN.replace(bits=bits, search=False))
    x = torch.randn(1, heads, length, 128)
    cache.append(x, x)
    assert 2 * 2 * heads * length * 128 / cache.nbytes >= floor


@pytest.mark.parametrize("bits, floor", [(4, 3.6), (3, 4.4), (2, 6.5)])
def test_memory_floor_token_by_token(bits, floor):
    """Growing in small steps leaves no more idle than the floors allow."""
    cache = ta.KVCache(1, 1, 128, config=PLAIN.replace(bits=bits, search=False))
    x = torch.randn(1, 1, 96, 128)
    for _ in range(86):
        cache.append(x, x)
    assert 2 * 2 * len(cache) * 128 / cache.nbytes >= floor


def slabs(cache: ta.KVCache) -> dict[tuple[str, int], int]:
    pools = {"sinks": cache._store.sinks, "compressed": cache._store.compressed}
    return {
        (name, number): slab.data_ptr()
        for name, pool in pools.items()
        if pool is not None
        for number, slab in pool._slabs.items()
    }


def test_growing_moves_nothing():
    cache, *_ = filled([200, 130])
    seen: dict = {}
    for _ in range(20):
        cache.append(*tokens(2, 2, 50, 16))
        now = slabs(cache)
        assert {key: now[key] for key in seen} == seen
        seen = now
    assert len(seen) > 5


@pytest.mark.parametrize("first", [1, 64, 128, 500])
@pytest.mark.parametrize("options", [{}, {"head_bits": [4, 2]}], ids=["decided widths", "given widths"])
def test_memory_for_max_tokens_is_taken_once(first, options):
    """From the moment the widths are known; no slab is added or freed until `max_tokens`."""
    cache = ta.KVCache(2, 2, 16, config=PLAIN, max_tokens=640, **options)
    k, v = tokens(2, 2, 640, 16)
    cache.append(k[:, :, :first], v[:, :, :first])
    for at in range(first, 128):
        cache.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
    at = max(first, 128)
    before, size = slabs(cache), cache._store.sinks.nbytes + cache._store.compressed.nbytes
    needed = 2 * cache._store.sinks.layout.page_bytes + 2 * 9 * cache._store.compressed.layout.page_bytes
    assert size == needed
    cache.append(k[:, :, at:], v[:, :, at:])
    assert slabs(cache) == before
    cache.crop(3)
    assert len(slabs(cache)) >= 1
    cache.append(k[:, :, 3:], v[:, :, 3:])
    assert cache._store.compressed.nbytes == 2 * 9 * cache._store.compressed.layout.page_bytes


def test_more_than_max_tokens_may_be_appended():
    cache = ta.KVCache(1, 2, 16, config=PLAIN, max_tokens=128)
    k, v = tokens(1, 2, 400, 16)
    cache.append(k, v)
    plain = ta.KVCache(1, 2, 16, config=PLAIN)
    plain.append(k, v)
    assert torch.equal(cache.dequantize()[0], plain.dequantize()[0])
