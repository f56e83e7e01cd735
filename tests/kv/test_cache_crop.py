"""Crops: the remaining tokens are unchanged, for any position of the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta
from turboattention.reference.exact import exact_attention

from ..helpers import normals, relative_error
from .tools import PLAIN, append_range, attend, content, filled, live_pages, sequence_content

# Block size 64 with one sink block: 200 tokens are a sink page, two compressed pages, 8 buffered.
LENGTH = 200
PLACES = (0, 1, 5, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 199, 200, 201, 10**9)
CUTS_COMPRESSED = (65, 100, 127, 129, 191)


def expect_prefix(cache: ta.KVCache, before: tuple[torch.Tensor, torch.Tensor], length: int) -> None:
    for got, want in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(got, want[:, :, :length])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bits", [4, 3, (8, 2)], ids=str)
def test_what_stays_is_unchanged(place, bits):
    cache, *_ = filled([LENGTH], config=PLAIN.replace(bits=bits))
    before = cache.dequantize()
    cache.crop(place)
    kept = min(place, LENGTH)
    assert cache.seq_lens.tolist() == [kept]
    assert cache.page_counts.tolist() == [kept // 64]
    assert live_pages(cache) == kept // 64
    expect_prefix(cache, before, kept)


@pytest.mark.parametrize("place", PLACES)
def test_attention_after_a_crop_is_attention_over_the_prefix(place):
    cache, *_ = filled([LENGTH])
    kept = min(place, LENGTH)
    k, v = (x[:, :, :kept] for x in cache.dequantize())
    cache.crop(place)
    got, lse = attend(cache, is_causal=False)
    want, want_lse = exact_attention(normals(1, 4, 3, 16, seed=9), k, v)
    if kept == 0:
        assert not bool(got.any())
        assert bool((lse == -torch.inf).all())
        return
    # What is left is the error of INT8 queries and weights: half a unit of 119 on logits up to 14.
    assert relative_error(got, want) < 0.08
    assert torch.allclose(lse.double(), want_lse, rtol=0, atol=0.1)


@pytest.mark.parametrize("place", [p for p in PLACES if p <= LENGTH and p not in CUTS_COMPRESSED])
@pytest.mark.parametrize("config", [PLAIN, PLAIN.replace(bits=2)], ids=["4 bits", "2 bits"])
def test_appending_the_same_again_restores_the_cache(place, config):
    """In the sinks, at block boundaries and in the buffer nothing is lost by a crop."""
    cache, k, v = filled([LENGTH], config=config)
    before = content(cache)
    cache.crop(place)
    append_range(cache, k, v, [place], [LENGTH])
    assert content(cache) == before


@pytest.mark.parametrize("place", CUTS_COMPRESSED)
def test_a_cut_into_a_compressed_block_returns_its_exact_int8_values(place):
    cache, k, v = filled([LENGTH], config=PLAIN.replace(bits=3))
    block = place // 64
    page = cache.page_tiles(block, block + 1)
    before = sequence_content(cache, 0)["pages"]
    cache.crop(place)
    rows = place - 64 * block
    buffer = cache.tail.tiles()
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(buffer, name)[0, :, :rows], getattr(page, name)[0, 0, :, :rows])
        assert not bool(getattr(buffer, name)[0, :, rows:].any())
    append_range(cache, k, v, [place], [LENGTH])
    after = sequence_content(cache, 0)["pages"]
    # Compressed again with new neighbours, that block may differ; no other does.
    assert [i for i, (a, b) in enumerate(zip(after, before, strict=True)) if a != b] in ([], [block])


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_block_compressed_twice_stays_near_its_tokens(bits):
    """Of the first compression's values: no more error than one more rounding of each channel."""
    cache, k, v = filled([128], config=PLAIN.replace(bits=bits, search=False))
    first = cache.page_tiles(1, 2)
    cache.crop(127)
    append_range(cache, k, v, [127], [128])
    second = cache.page_tiles(1, 2)
    moved = (second.v8 - first.v8)[0, 0, :, :63].abs()
    widest = {4: 16, 3: 34, 2: 80}[bits]
    assert int(moved.max()) <= (widest + 1) // 2


def test_each_sequence_may_be_cropped_to_its_own_length():
    lengths, targets = [200, 130, 64, 10], [100, 129, 500, 0]
    cache, *_ = filled(lengths)
    before = cache.dequantize()
    cache.crop(torch.tensor(targets))
    kept = [min(a, b) for a, b in zip(lengths, targets, strict=True)]
    assert cache.seq_lens.tolist() == kept
    got = cache.dequantize()
    for side in range(2):
        for row, length in enumerate(kept):
            assert torch.equal(got[side][row, :, :length], before[side][row, :, :length])
            assert not bool(got[side][row, :, length:].any())


def test_cropped_sequences_do_not_touch_the_others():
    cache, *_ = filled([200, 200])
    want = sequence_content(cache, 1)
    cache.crop(torch.tensor([70, 200]))
    assert sequence_content(cache, 1) == want


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 260), st.integers(0, 260)), min_size=1, max_size=5))
def test_any_walk_of_crops_and_appends_within_eight_bits(walk):
    """At 8 bits nothing is lost, so every walk ends in the same cache as one append."""
    config = PLAIN.replace(bits=8)
    whole, k, v = filled([260], config=config)
    cache = ta.KVCache(1, 2, 16, config=config)
    at = 0
    for back, forth in [*walk, (260, 260)]:
        cache.crop(back)
        at = min(at, back)
        if forth > at:
            append_range(cache, k, v, [at], [forth])
            at = forth
        assert cache.seq_lens.tolist() == [at]
    assert content(cache) == content(whole)


def test_a_lag_keeps_rejected_tokens_out_of_pages():
    """Speculation by up to `flush_lag` tokens never reaches a compressed block."""
    config = PLAIN.replace(flush_lag=20, bits=2)
    accepted, k, v = filled([300], config=config)
    cache = ta.KVCache(1, 2, 16, config=config)
    at = 0
    while at < 300:
        end = min(at + 20, 300)
        append_range(cache, k, v, [at], [end])
        pages = cache.page_counts.tolist()
        cache.crop(min(at + 7, 300))
        assert cache.page_counts.tolist() == pages  # no page was given back
        at = min(at + 7, 300)
    assert content(cache) == content(accepted)


def test_lag_by_hand():
    config = PLAIN.replace(flush_lag=20)
    for length, pages in ((64, 0), (83, 0), (84, 1), (147, 1), (148, 2), (300, 4)):
        cache, *_ = filled([length], config=config)
        assert cache.page_counts.tolist() == [pages]
    cache, *_ = filled([300], config=config)
    plain, *_ = filled([300])
    assert torch.equal(cache.dequantize()[0][:, :, :256], plain.dequantize()[0][:, :, :256])


def test_cropping_an_empty_cache():
    cache = ta.KVCache(2, 2, 16)
    cache.crop(5)
    assert cache.seq_lens.tolist() == [0, 0]


def test_a_crop_to_nothing_forgets_the_mean():
    """Other tokens later get a mean of their own."""
    cache, *_ = filled([200])
    other, k, v = filled([200], seed=7)
    cache.crop(0)
    cache.append(k, v)
    assert content(cache) == content(other)
