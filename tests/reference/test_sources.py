"""How attention reads a cache: never dequantized, never all of it at once, and no page that nobody sees."""

from __future__ import annotations

import torch

import turboattention as ta
from turboattention.kv.cache import KVCache

from ..helpers import normals, qkv
from .test_decode import OFF, call


def test_attention_never_dequantizes_the_cache(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the cache was dequantized")

    q, k, v = qkv(1, 4, 2, 200, 200, 16)
    cache = KVCache(1, 2, 16, config=OFF)
    call(cache, q, k, v, 0, 150)  # this call decides the widths, from its own tokens
    monkeypatch.setattr(KVCache, "dequantize", forbidden)
    monkeypatch.setattr("turboattention.kv.dequantization.dequantize", forbidden)
    monkeypatch.setattr("turboattention.kv.pages.Tiles.floats", forbidden)
    for start, end in ((150, 190), (190, 191), (191, 200)):
        call(cache, q, k, v, start, end)


def test_a_long_cache_is_read_in_spans(monkeypatch):
    """Never all of it at once: the spans follow the budget, do not overlap, and reach every page once."""
    k, v = (normals(1, 2, 64 * 40 + 5, 16, seed=s) for s in (1, 2))
    q = normals(1, 4, 1, 16)
    cache = KVCache(1, 2, 16, config=OFF.replace(search=False))
    cache.append(k, v)
    want = ta.turbo_attention_with_kvcache(q, cache, backend="reference")
    spans = []
    original = KVCache.page_tiles

    def recorded(self, first, last):
        spans.append((first, last))
        return original(self, first, last)

    monkeypatch.setattr(KVCache, "page_tiles", recorded)
    monkeypatch.setattr("turboattention.reference.attention._SCORES_AT_ONCE", 3 * 64 * 4)
    got = ta.turbo_attention_with_kvcache(q, cache, backend="reference")
    assert [n for span in spans for n in range(*span) if n < 40] == list(range(40))
    assert max(last - first for first, last in spans) == 3
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_windowed_query_reads_only_the_pages_it_sees(monkeypatch):
    k, v = (normals(1, 2, 64 * 20, 16, seed=s) for s in (1, 2))
    cache = KVCache(1, 2, 16, config=OFF)
    cache.append(k, v)
    spans = []
    original = KVCache.page_tiles
    monkeypatch.setattr(KVCache, "page_tiles", lambda self, a, b: (spans.append((a, b)), original(self, a, b))[1])
    monkeypatch.setattr("turboattention.reference.attention._SCORES_AT_ONCE", 1)
    ta.turbo_attention_with_kvcache(normals(1, 4, 1, 16), cache, window_size=100, backend="reference")
    assert spans == [(18, 19), (19, 20)]
