"""`stored_prefill` in the C++ kernels: queries read earlier blocks' pages and their own block's INT8 rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import qkv
from . import tools  # noqa: F401
from .attending import cache_both, prefill_both
from .test_attention_cache import filled, with_new

STORED = ta.TurboConfig(guard="off", stored_prefill=True)
CONFIGS = {
    "default": STORED,
    "2 bits": STORED.replace(bits=2, sink_tokens=0),
    "mixed": STORED.replace(bits="mixed", sink_tokens=128),
    "keys in order": STORED.replace(bits=3, reorder_k=True),
    "a scale per row": STORED.replace(p_scale="row"),
    "serving": ta.TurboConfig.serving(guard="off"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("options", [{}, {"window_size": 90}, {"is_causal": False}, {"softcap": 2.0}], ids=str)
def test_calls_that_fill_blocks(config, options):
    for lengths in ([0, 1, 60, 64, 100, 127, 300], [0, 1, 60, 64, 100, 127]):
        for tokens in (1, 4, 30, 70, 200):
            cache_both(*with_new(filled(lengths, config=config), 4, tokens), **options)


@pytest.mark.parametrize("options", [{}, {"window_size": 90}], ids=str)
@pytest.mark.parametrize("sink_tokens", [0, 64, 128])
def test_a_call_that_fixes_the_order_of_channels(sink_tokens, options):
    """Reordered pages combined with sinks and tail rows that are not, first in the call that fixes the order."""
    config = STORED.replace(sink_tokens=sink_tokens, bits=3, reorder_k=True)
    for lengths in ([70, 0, 127, 64], [3, 60, 1, 2]):
        cache = filled(lengths, 32, config, **options)
        before = cache.k_order
        q, cache, k, v = with_new(cache, 4, 190)
        q = q * torch.logspace(0, -1, 32)
        cache_both(q, cache, k, v, **options)
        assert cache.k_order is not None
        assert sink_tokens == 0 or before is None
        cache_both(*with_new(cache, 4, 3), **options)


def test_masks():
    cache = filled([100, 10], config=STORED)
    q, cache, k, v = with_new(cache, 4, 150)
    mask = torch.rand(2, 1, 150, 250, generator=torch.Generator().manual_seed(3)) > 0.3
    cache_both(q, cache, k, v, attn_mask=mask)


def test_without_a_cache():
    prefill_both(*qkv(2, 4, 2, 150, 200, 32), is_causal=True, config=STORED)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 299), max_size=6))
def test_chunks_do_not_matter(config, cuts):
    """Neither the result, but for the order of sums, nor what is then stored. (All queries of the call that compresses
    the first block have a say in the order of K's channels.)"""
    config = config.replace(reorder_k=False)
    q, k, v = qkv(2, 4, 2, 300, 300, 16)

    def run(ends):
        cache, start, parts = KVCache(2, 2, 16, config=config), 0, []
        for end in ends:
            part = (x[:, :, start:end] for x in (q, k, v))
            one, *new = part
            parts.append(ta.turbo_attention_with_kvcache(one, cache, *new, backend="cpu"))
            start = end
        return torch.cat(parts, 2), cache

    whole, stored = run([300])
    cut, other = run([*sorted(set(cuts)), 300])
    assert torch.allclose(cut, whole, rtol=1e-5, atol=2e-6)
    for x, y in zip(stored.dequantize(), other.dequantize(), strict=True):
        assert torch.equal(x, y)


def test_steps_take_one_call_but_not_past_a_block_that_fills():
    cache = filled([200, 190], config=STORED)
    cache_both(*with_new(cache, 4, 1))
    cache_both(*with_new(cache, 4, 60))
