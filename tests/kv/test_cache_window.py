"""Sliding windows: old blocks are released, and nothing that is still visible changes."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.errors import InputError

from ..helpers import normals
from .tools import PLAIN, append_range, attend, content, filled, live_pages, part_of, tokens

CONFIGS = {
    "default": PLAIN,
    "no sinks": PLAIN.replace(sink_tokens=0, bits=3),
    "small blocks, lag": PLAIN.replace(block_size=16, sink_tokens=32, flush_lag=9),
    "paper": ta.TurboConfig.paper(),
}


def both(lengths: list[int], window: int, config: ta.TurboConfig = PLAIN):
    """The same tokens in a cache with a window and in one without."""
    kept, k, v = filled(lengths, config=config, window_size=window)
    whole, *_ = filled(lengths, config=config)
    return kept, whole, k, v


def held(length: int, window: int, size: int) -> int:
    """Blocks in front of the window of the next query, and of the one behind a crop of 16 tokens."""
    return max(0, (length - window + 1 - 16) // size)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("window", [1, 40, 64, 100, 1000])
def test_decoding_gives_the_same_as_without_eviction(config, window):
    kept, whole, _, _ = both([400, 70, 131], window, config)
    for step in range(3):
        q = normals(3, 4, 1, 16, seed=step)
        k, v = tokens(3, 2, 1, 16, seed=50 + step)
        got = ta.turbo_attention_with_kvcache(q, kept, k, v, return_lse=True)
        want = ta.turbo_attention_with_kvcache(q, whole, k, v, return_lse=True, window_size=window)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("chunks", [(500,), (64,) * 8, (70, 1, 200, 3, 150), (1,) * 40 + (300,)])
def test_chunked_prefill_gives_the_same_as_without_eviction(chunks):
    window = 90
    k, v = tokens(2, 2, sum(chunks), 16)
    kept, whole = ta.KVCache(2, 2, 16, config=PLAIN, window_size=window), ta.KVCache(2, 2, 16, config=PLAIN)
    at = 0
    for count in chunks:
        part = k[:, :, at : at + count], v[:, :, at : at + count]
        q = normals(2, 4, count, 16, seed=at)
        got = ta.turbo_attention_with_kvcache(q, kept, *part)
        assert torch.equal(got, ta.turbo_attention_with_kvcache(q, whole, *part, window_size=window))
        at += count
    assert kept.seq_lens.tolist() == [at, at]


@pytest.mark.parametrize("window", [1, 64, 65, 100, 300])
@pytest.mark.parametrize("length", [63, 128, 191, 192, 193, 500])
def test_pages_behind_the_window_are_released(window, length):
    cache, *_ = filled([length], window_size=window)
    gone = min(held(length, window, 64), length // 64)
    assert cache.page_counts.tolist() == [length // 64]
    assert cache.readable_pages(length // 64)[0].tolist() == [block >= gone for block in range(length // 64)]
    assert live_pages(cache) == length // 64 - gone
    if gone:
        assert cache.page_table.pools.sinks.nbytes == 0


def test_memory_stays_bounded_while_tokens_flow():
    cache = ta.KVCache(1, 2, 16, config=PLAIN, window_size=100)
    k, v = tokens(1, 2, 50, 16)
    sizes = []
    for _ in range(60):
        cache.append(k, v)
        sizes.append(cache.nbytes - 4 * int(cache.page_counts))
    assert len(cache) == 3000
    assert live_pages(cache) <= 4  # 100 tokens and a block of slack, unaligned
    assert max(sizes[10:]) <= sizes[10] + 2 * cache.page_table.pools.compressed.layout.page_bytes


def test_evicted_tokens_dequantize_to_zero():
    kept, whole, *_ = both([400], 100)
    gone = 64 * held(400, 100, 64)
    assert gone == 256
    for got, want in zip(kept.dequantize(), whole.dequantize(), strict=True):
        assert not bool(got[:, :, :gone].any())
        assert torch.equal(got[:, :, gone:], want[:, :, gone:])


@pytest.mark.parametrize("window", [1, 50, 64, 130])
@pytest.mark.parametrize("config", [PLAIN, PLAIN.replace(sink_tokens=0)], ids=["sinks", "no sinks"])
def test_a_crop_is_right_or_refused(window, config):
    """Never silently wrong: what is accepted attends like a cache that never evicted."""
    length, accepted = 330, []
    untouched, reference, _, _ = both([length], window, config)
    before = content(untouched)
    new, q = tokens(1, 2, 3, 16, seed=2), normals(1, 4, 3, 16)
    for target in range(0, length + 1, 5):
        kept, whole = untouched.clone(), reference.clone()
        if refused(kept, target, window):
            assert content(kept) == before
            continue
        accepted.append(target)
        whole.crop(target)
        got = ta.turbo_attention_with_kvcache(q, kept, *new)
        assert torch.equal(got, ta.turbo_attention_with_kvcache(q, whole, *new, window_size=window))
    # To forget everything is always possible.
    assert set(accepted) >= {0, *(t for t in range(length - 16, length + 1) if t % 5 == 0)}
    assert len(accepted) < 66


def refused(cache: ta.KVCache, target: int, window: int) -> bool:
    """Whether a crop to `target` is refused, and then in the right words."""
    try:
        cache.crop(target)
    except InputError as error:
        words = f"length: expected a crop of at most 16 tokens with a window of {window}"
        if not str(error).startswith(words):
            raise
        return True
    return False


def test_a_crop_needs_what_every_sequence_needs():
    cache, *_ = filled([500, 500], window_size=50)
    with pytest.raises(InputError, match="older blocks were released"):
        cache.crop(torch.tensor([300, 500]))
    assert cache.seq_lens.tolist() == [500, 500]
    cache.crop(torch.tensor([440, 500]))
    assert cache.seq_lens.tolist() == [440, 500]


@pytest.mark.parametrize("rows, fine", [(1, True), (17, True), (200, False), (400, False)])
def test_queries_that_reach_back_to_released_blocks_are_refused(rows, fine):
    """Without new tokens, a query may be at a released position: this raises an error."""
    kept, whole, *_ = both([400], 100)
    q = normals(1, 4, rows, 16)
    if fine:
        got = ta.turbo_attention_with_kvcache(q, kept)
        assert torch.equal(got, ta.turbo_attention_with_kvcache(q, whole, window_size=100))
        return
    with pytest.raises(
        InputError,
        match=rf"^q: expected rows whose window of 100 keys the cache still holds .* position {400 - rows} on$",
    ):
        ta.turbo_attention_with_kvcache(q, kept)


def test_a_narrower_window_may_reach_back_further():
    kept, whole, *_ = both([400], 100)
    q = normals(1, 4, 100, 16)
    got = ta.turbo_attention_with_kvcache(q, kept, window_size=20)
    assert torch.equal(got, ta.turbo_attention_with_kvcache(q, whole, window_size=20))


def test_ragged_queries_are_judged_by_their_own_sequence():
    kept, whole, _, _ = both([400, 10], 100)
    more = tokens(2, 2, 30, 16, seed=1)
    lengths = torch.tensor([2, 30])
    q = normals(2, 4, 30, 16)
    got = ta.turbo_attention_with_kvcache(q, kept, *more, lengths=lengths)
    assert torch.equal(got, ta.turbo_attention_with_kvcache(q, whole, *more, lengths=lengths, window_size=100))


def test_clones_evict_on_their_own():
    cache, *_ = filled([200], window_size=64)
    before = content(cache)
    copy = cache.clone()
    copy.append(*tokens(1, 2, 200, 16))
    assert content(cache) == before
    attend(cache)


def test_eviction_does_not_depend_on_chunks():
    k, v = tokens(2, 2, 333, 16)
    whole, pieces = (ta.KVCache(2, 2, 16, config=PLAIN, window_size=70) for _ in range(2))
    append_range(whole, k, v, [0, 0], [333, 150])
    for starts, ends in (([0, 0], [10, 90]), ([10, 90], [200, 91]), ([200, 91], [333, 150])):
        pieces.append(*part_of(k, v, starts, ends))
    assert content(pieces) == content(whole)
