"""Bytes: all of them counted, few of them idle, none of them moved."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import turboattention as ta
from turboattention.errors import InputError
from turboattention.kv.pool import PagePool

from .tools import PLAIN, content, filled, live_pages, pool_bytes, tokens

OF_KERNELS = ("backend_state", "_addresses")
"""Memory that `nbytes` does not count: page addresses, and state shared by steps."""


def tensors_of(thing: object, seen: set[int]) -> list[torch.Tensor]:
    """All tensors that an object holds, directly or indirectly."""
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
    "order": {"config": PLAIN.replace(reorder_k=True)},
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


def test_nbytes_counts_what_an_order_is_learned_from():
    cache = ta.KVCache(2, 2, 16, config=PLAIN.replace(reorder_k=True))
    k, v = tokens(2, 2, 30, 16)
    ta.turbo_attention_with_kvcache(k, cache, k, v)
    assert cache.query_energy is not None
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


def places(cache: ta.KVCache) -> set[int]:
    """The addresses of all pages, used or reserved."""
    pools = [pool for pool in (cache.page_table.pools.sinks, cache.page_table.pools.compressed) if pool is not None]
    rows = [(pool, *place) for pool in pools for place in (*pool._pages.values(), *pool._idle)]
    return {slab.memory.data_ptr() + row * pool.layout.page_bytes for pool, slab, row in rows}


def test_growing_moves_nothing():
    cache, *_ = filled([200, 130])
    seen = places(cache)
    for _ in range(20):
        cache.append(*tokens(2, 2, 50, 16))
        now = places(cache)
        assert seen <= now
        seen = now
    assert len(seen) > 30


@pytest.mark.parametrize("first", [1, 64, 128, 500])
@pytest.mark.parametrize("options", [{}, {"head_bits": [4, 2]}], ids=["decided widths", "given widths"])
def test_memory_for_max_tokens_is_taken_once(first, options):
    """From the moment the widths are known; no page is added or freed until `max_tokens`."""
    cache = ta.KVCache(2, 2, 16, config=PLAIN, max_tokens=640, **options)
    k, v = tokens(2, 2, 640, 16)
    cache.append(k[:, :, :first], v[:, :, :first])
    for at in range(first, 128):
        cache.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
    at = max(first, 128)
    pools = cache.page_table.pools
    before, size = places(cache), pools.sinks.nbytes + pools.compressed.nbytes
    needed = 2 * pools.sinks.layout.page_bytes + 2 * 9 * pools.compressed.layout.page_bytes
    assert size == needed
    cache.append(k[:, :, at:], v[:, :, at:])
    assert places(cache) == before
    cache.crop(3)
    assert places(cache) == before
    cache.append(k[:, :, 3:], v[:, :, 3:])
    assert cache.page_table.pools.compressed.nbytes == 2 * 9 * cache.page_table.pools.compressed.layout.page_bytes


def test_more_than_max_tokens_may_be_appended():
    cache = ta.KVCache(1, 2, 16, config=PLAIN, max_tokens=128)
    k, v = tokens(1, 2, 400, 16)
    cache.append(k, v)
    plain = ta.KVCache(1, 2, 16, config=PLAIN)
    plain.append(k, v)
    assert torch.equal(cache.dequantize()[0], plain.dequantize()[0])


# -- memory follows what is live ---------------------------------------------------------------------


def appended(pieces: list[int], batch: int = 1, **options) -> ta.KVCache:
    cache = ta.KVCache(batch, 2, 16, config=PLAIN, **options)
    k, v = tokens(batch, 2, sum(pieces), 16)
    at = 0
    for piece in pieces:
        cache.append(k[:, :, at : at + piece], v[:, :, at : at + piece])
        at += piece
    return cache


WAYS = {
    "one append": [3000],
    "by 100": [100] * 30,
    "token by token behind a prompt": [2800] + [1] * 200,
    "two halves": [1500] * 2,
    "first block apart": [64, 2936],
}


@pytest.mark.parametrize("window", [1, 63, 64, 65, 512])
@pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)
def test_a_window_holds_itself_and_a_block(pieces, window):
    """Independent of how its tokens arrived, and without idle memory."""
    cache = appended(pieces, window_size=window)
    pages = -(-(window - 1) // 64) + 1
    assert live_pages(cache) <= pages
    buffered = sum(getattr(cache.tail, name).nbytes for name in cache.tail.TENSORS)
    assert cache.nbytes <= pages * cache.page_table.pools.compressed.layout.page_bytes + buffered + 600
    assert pool_bytes(cache) == live_pages(cache) * cache.page_table.pools.compressed.layout.page_bytes


@pytest.mark.parametrize("window", [64, 100])
def test_a_window_filled_at_once_holds_what_one_filled_slowly_does(window):
    at_once, slowly = (appended(WAYS[way], window_size=window) for way in ("one append", "by 100"))
    assert content(at_once) == content(slowly)
    assert at_once.nbytes == slowly.nbytes


def test_a_long_append_never_writes_what_its_window_has_passed(monkeypatch):
    sizes = []
    allocate = PagePool.allocate
    monkeypatch.setattr(PagePool, "allocate", lambda pool, runs: sizes.append(sum(runs)) or allocate(pool, runs))
    appended([3000], window_size=128)
    assert 0 < sum(sizes) <= 4


def test_a_crop_frees_what_it_cuts():
    cache, small = appended([3000]), appended([200])
    cache.crop(200)
    assert cache.nbytes == small.nbytes


@pytest.mark.parametrize("options", [{}, {"max_tokens": 3000}], ids=["plain", "reserved"])
def test_a_selected_row_holds_its_own_need(options):
    cache, alone = appended([1000], batch=8, **options), appended([1000], **options)
    cache.reorder(torch.tensor([3]))
    assert cache.nbytes == alone.nbytes


@pytest.mark.parametrize("keep", [2800, 2000, 200])
def test_a_row_of_a_cropped_batch_holds_its_own_need(keep):
    cache, alone = appended([3000], batch=4), appended([keep])
    cache.crop(keep)
    cache.reorder(torch.tensor([3]))
    assert counted(cache) == counted(alone)


def test_a_row_that_shared_pages_with_a_longer_one_holds_its_own_need():
    cache, alone = appended([3000]), appended([200])
    cache.reorder(torch.tensor([0, 0]))
    cache.crop(torch.tensor([2500, 200]))
    cache.reorder(torch.tensor([1]))
    assert counted(cache) == counted(alone)


STEPS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 30, 64, 700, 2500])),
    st.tuples(st.just("ragged"), st.sampled_from([30, 700, 2500])),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("select"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["clone", "drop", "deepcopy"]), st.none()),
)


@given(
    steps=st.lists(STEPS, min_size=2, max_size=10),
    window=st.sampled_from([None, None, 100, 512]),
    sinks=st.sampled_from([0, 64]),
    seed=st.integers(0, 999),
)
@example([("append", 2500), ("crop", 0.3), ("select", 1)], None, 64, 0)
@example([("append", 2500), ("select", 4), ("crop", 0.0), ("select", 1), ("select", 2)], None, 64, 1)
@example([("append", 700), ("crop", 0.5), ("clone", None), ("deepcopy", None), ("select", 1)], None, 0, 2)
@settings(max_examples=60, deadline=None)
def test_whatever_happened_memory_is_that_of_what_is_left(steps, window, sinks, seed):
    """At most 1.1 times that of a cache which only ever held these tokens."""
    draw, clones = random.Random(seed), []
    config = PLAIN.replace(sink_tokens=sinks, search=False)
    cache = ta.KVCache(3, 1, 16, config=config, window_size=window)
    for kind, what in steps:
        batch = cache.batch_size
        if kind in ("append", "ragged"):
            lengths = None if kind == "append" else torch.tensor([draw.randint(0, what) for _ in range(batch)])
            cache.append(*tokens(batch, 1, what, 16, seed=seed), lengths)
        elif kind == "crop":
            least = [int(length * what) if window is None else max(int(length) - 16, 0) for length in cache.seq_lens]
            target = [draw.randint(low, int(x)) for low, x in zip(least, cache.seq_lens, strict=True)]
            with contextlib.suppress(InputError):  # of a window, after another crop
                cache.crop(torch.tensor(target))
        elif kind == "select":
            cache.reorder(torch.tensor([draw.randrange(batch) for _ in range(what)]))
        elif kind == "clone":
            clones.append(cache.clone())
        elif kind == "deepcopy":
            cache = copy.deepcopy(cache)
        else:
            clones.clear()
    clones.clear()
    anew = ta.KVCache(cache.batch_size, 1, 16, config=config, window_size=window)
    longest = max(cache.seq_lens.tolist(), default=0)
    anew.append(*tokens(cache.batch_size, 1, longest, 16), cache.seq_lens)
    assert cache.nbytes == counted(cache)
    assert counted(cache) <= 1.1 * counted(anew)


def test_pages_are_copied_at_most_a_few_times(monkeypatch):
    """Cropping by a few tokens at a time does not copy the remaining tokens each time; nor does selecting beams."""
    cache, copied = appended([4000]), []
    write = PagePool.write
    monkeypatch.setattr(PagePool, "write", lambda pool, pages, x: copied.append(len(pages)) or write(pool, pages, x))
    for length in range(3990, 2000, -10):
        cache.crop(length)
    assert sum(copied) < 8 * 64
    cache.reorder(torch.zeros(4, dtype=torch.int64))
    copied.clear()
    for step in range(40):
        cache.append(*tokens(4, 2, 10, 16, seed=step))
        cache.reorder(torch.tensor([0, 0, 2, 1]))
    assert sum(copied) <= 4 * (10 * 40 // 64 + 1)


def test_a_clone_counts_its_own_pages():
    cache, small = appended([3000]), appended([200])
    other = cache.clone()
    other.crop(200)
    assert other.nbytes == small.nbytes
    assert cache.nbytes == appended([3000]).nbytes


@pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)
def test_a_window_reserves_no_more_than_it_needs(pieces):
    cache, plain = (appended(pieces, window_size=512, max_tokens=most) for most in (8000, None))
    assert cache.nbytes <= plain.nbytes + cache.page_table.pools.compressed.layout.page_bytes
    short = appended([200], window_size=512, max_tokens=256)
    pools = short.page_table.pools
    assert pool_bytes(short) == pools.sinks.layout.page_bytes + 3 * pools.compressed.layout.page_bytes


def test_what_a_window_reserves_is_within_a_tenth_of_the_most_that_it_holds():
    """A window of 512 holds the most just before a block fills."""
    plain, reserving = (ta.KVCache(1, 1, 64, config=PLAIN, window_size=512, max_tokens=most) for most in (None, 8000))
    most = 0
    for count in (6000, *[1] * 64):
        k, v = tokens(1, 1, count, 64)
        plain.append(k, v)
        reserving.append(k, v)
        most = max(most, plain.nbytes)
    assert reserving.nbytes <= 1.1 * most


@pytest.mark.parametrize("reorder", [False, True])
def test_the_memory_of_gemma_3_after_6000_tokens(reorder):
    """Of 18 layers with one KV head of 256 channels, 15 have a window of 512, of which transformers keeps 511 keys."""
    config = PLAIN.replace(reorder_k=reorder, search=False)
    whole, window = (ta.KVCache(1, 1, 256, config=config, window_size=size) for size in (None, 512))
    for cache in (whole, window):
        cache.append(*tokens(1, 1, 6000, 256))
    own = 2 * 2 * 256 * (3 * 6000 + 15 * 511)
    assert 3.5 * (3 * whole.nbytes + 15 * window.nbytes) < own


@pytest.mark.parametrize("window", [1, 48, 49, 50, 113])
def test_a_window_never_needs_more_than_it_reserved(window):
    """Token by token, past several evictions; and at some time it needs all of it."""
    cache = appended([130], window_size=window, max_tokens=8000)
    pool, most = cache.page_table.pools.compressed, 0
    reserved = pool.nbytes
    for token in range(200):
        cache.append(*tokens(1, 2, 1, 16, seed=token))
        assert pool.nbytes == reserved
        most = max(most, len(pool._counts) * pool.layout.page_bytes)
    assert most in (reserved, reserved - pool.layout.page_bytes)


def test_running_out_of_memory_leaves_the_cache_as_it_was(monkeypatch):
    cache = appended([60])
    before, calls = content(cache), []

    def allocate(pool, runs):
        calls.append(sum(runs))
        if len(calls) == 2:
            raise MemoryError
        return original(pool, runs)

    original = PagePool.allocate
    monkeypatch.setattr(PagePool, "allocate", allocate)
    with pytest.raises(MemoryError):
        cache.append(*tokens(1, 2, 300, 16, seed=4))
    assert calls == [1, 4]
    monkeypatch.undo()
    after = content(cache)
    assert after["sequences"] == before["sequences"]
    assert live_pages(cache) == 0
