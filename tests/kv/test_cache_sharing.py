"""Clones and reordered sequences: they share pages, and never see each other's changes."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta

from .tools import PLAIN, append_range, content, filled, live_pages, pool_bytes, sequence_content, tokens

CHANGES = {
    "append": lambda cache: cache.append(*tokens(cache.batch_size, 2, 70, 16, seed=5)),
    "crop into a page": lambda cache: cache.crop(100),
    "crop and append": lambda cache: (cache.crop(100), cache.append(*tokens(cache.batch_size, 2, 70, 16, seed=5))),
    "crop to nothing": lambda cache: cache.crop(0),
    "reorder": lambda cache: cache.reorder(torch.tensor([1, 1, 0])),
    "drop": lambda cache: cache.reorder(torch.tensor([1])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("config", [PLAIN, ta.TurboConfig.paper()], ids=["default", "paper"])
def test_a_clone_and_its_original_are_independent(change, config):
    cache, *_ = filled([200, 130], config=config)
    before = content(cache)
    copy = cache.clone()
    assert content(copy) == before
    change(copy)
    assert content(cache) == before
    assert content(copy) != before
    copy = cache.clone()
    change(cache)
    assert content(copy) == before
    assert content(cache) != before


def test_a_clone_shares_pages():
    cache, *_ = filled([200, 130])
    before, pages = pool_bytes(cache), live_pages(cache)
    copies = [cache.clone() for _ in range(3)]
    assert pool_bytes(cache) == before
    assert live_pages(cache) == pages
    assert copies[0].page_table.pools.sinks is cache.page_table.pools.sinks
    assert copies[0].page_table.pools.compressed is cache.page_table.pools.compressed
    assert copies[0].tail.k8.data_ptr() != cache.tail.k8.data_ptr()


def test_memory_is_released_when_the_last_clone_dies():
    cache, *_ = filled([200])
    copy = cache.clone()
    copy.append(*tokens(1, 2, 130, 16, seed=3))
    pool, own = cache.page_table.pools.compressed, live_pages(copy)
    assert own == 3 + 2
    del copy
    gc.collect()
    assert live_pages(cache) == 3
    before = content(cache)
    copy = cache.clone()
    cache.crop(0)
    assert live_pages(copy) == 3
    assert content(copy) == before
    del copy
    gc.collect()
    assert pool.nbytes == 0
    assert live_pages(cache) == 0


def test_pages_written_later_are_not_shared():
    cache, *_ = filled([200])
    copy = cache.clone()
    for target, seed in ((cache, 3), (copy, 4)):
        target.append(*tokens(1, 2, 64, 16, seed=seed))
    assert live_pages(cache) == 3 + 1 + 1
    mine, theirs = (sequence_content(c, 0)["pages"] for c in (cache, copy))
    assert mine[:3] == theirs[:3]
    assert mine[3] != theirs[3]


@pytest.mark.parametrize("length", [0, 5, 64, 127])
def test_clones_from_before_the_widths_were_frozen(length):
    cache, k, v = filled([length]) if length else (ta.KVCache(1, 2, 16, config=PLAIN), None, None)
    copy = cache.clone()
    cache.append(*tokens(1, 2, 200, 16, seed=1))
    copy.append(*tokens(1, 2, 200, 16, seed=2))
    again = ta.KVCache(1, 2, 16, config=PLAIN)
    if length:
        again.append(k, v)
    again.append(*tokens(1, 2, 200, 16, seed=2))
    assert content(copy) == content(again)
    assert content(cache) != content(copy)


def test_a_clone_keeps_label_window_and_widths():
    cache = ta.KVCache(1, 2, 16, window_size=100, head_bits=[4, 2], config=PLAIN)
    cache.label = "layer 3"
    copy = cache.clone()
    assert (copy.label, copy.window_size, copy.head_bits.tolist()) == ("layer 3", 100, [[4, 2], [4, 2]])


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), max_size=5))
def test_reordered_sequences_are_what_they_were(index):
    cache, *_ = filled([200, 64, 131])
    before = [sequence_content(cache, b) for b in range(3)]
    pages = live_pages(cache)
    cache.reorder(torch.tensor(index, dtype=torch.int64))
    assert cache.batch_size == len(index)
    assert [sequence_content(cache, b) for b in range(len(index))] == [before[i] for i in index]
    assert live_pages(cache) == sum((4 - 1, 1, 2)[i] for i in set(index)) <= pages


def test_beams_diverge_without_touching_each_other():
    """Repeats are copies on write, as beam search needs them."""
    cache, k, v = filled([130, 200])
    cache.reorder(torch.tensor([1, 0, 1]))
    more = tokens(3, 2, 80, 16, seed=8)
    cache.append(*more, torch.tensor([80, 3, 70]))
    for row, (source, length, new) in enumerate(((1, 200, 80), (0, 130, 3), (1, 200, 70))):
        alone = ta.KVCache(1, 2, 16, config=PLAIN)
        append_range(alone, k[source : source + 1], v[source : source + 1], [0], [length])
        append_range(alone, more[0][row : row + 1], more[1][row : row + 1], [0], [new])
        assert sequence_content(cache, row) == sequence_content(alone, 0)
    cache.crop(torch.tensor([10, 200, 200]))
    assert int(cache.seq_lens[0]) == 10
    assert sequence_content(cache, 2)["length"] == 200


def test_reordering_shares_pages_between_repeats():
    cache, *_ = filled([200])
    before, pages = pool_bytes(cache), live_pages(cache)
    cache.reorder(torch.zeros(6, dtype=torch.int64))
    assert pool_bytes(cache) == before
    assert live_pages(cache) == pages == 3
    cache.reorder(torch.tensor([4]))
    assert live_pages(cache) == 3


def test_reordering_takes_int32_and_an_empty_cache():
    cache, *_ = filled([70, 3])
    cache.reorder(torch.tensor([1, 0], dtype=torch.int32))
    assert cache.seq_lens.tolist() == [3, 70]
    empty = ta.KVCache(2, 2, 16)
    empty.reorder(torch.tensor([0, 0, 1]))
    assert empty.batch_size == 3
    empty.append(*tokens(3, 2, 5, 16))
    assert empty.seq_lens.tolist() == [5, 5, 5]


def test_a_shallow_copy_is_a_clone():
    """It shared the buffer's memory, with a length of its own."""
    cache, *_ = filled([150])
    cache.append(*tokens(1, 2, 1, 16, seed=1))
    copies = copy.copy(cache)
    pages = live_pages(cache)
    cache.append(*tokens(1, 2, 3, 16, seed=2))
    before = content(cache)
    copies.append(*tokens(1, 2, 3, 16, seed=3))
    assert content(cache) == before
    assert content(copies) != before
    assert live_pages(cache) == pages
    assert copies.handle.tolist() != cache.handle.tolist()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "lengths, options",
    [([70, 3], {}), ([200, 130], {}), ([200, 130], {"max_tokens": 300}), ([200, 130], {"window_size": 70})],
    ids=["short", "frozen", "reserved", "window"],
)
def test_a_deep_copy_holds_its_own_pages_and_no_clone_s(lengths, options, duplicate):
    alone, *_ = filled(lengths, **options)
    cache, *_ = filled(lengths, **options)
    clone = cache.clone()
    clone.append(*tokens(2, 2, 500, 16, seed=3))
    other = duplicate(cache)
    assert content(other) == content(cache)
    assert live_pages(other) == live_pages(alone)
    assert pool_bytes(other) == pool_bytes(alone)
    other.crop(0)
    assert live_pages(other) == 0


def test_a_deep_copy_while_clones_in_other_threads_change():
    cache, *_ = filled([700])
    want, stop, failed = content(cache), threading.Event(), []

    def change() -> None:
        clone = cache.clone()
        while not stop.is_set():
            clone.append(*tokens(1, 2, 300, 16, seed=3))
            clone.crop(100)

    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=change) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(50):
            failed += [1] * (content(copy.deepcopy(cache)) != want)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
