"""The guard on clean data: it issues no warning (an error in this suite) and changes nothing."""

from __future__ import annotations

import pytest

import turboattention as ta

from .helpers import qkv


@pytest.mark.parametrize("bits", [8, 4, 3, 2, "mixed", (4, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_normal_data(bits, head_dim):
    q, k, v = qkv(2, 4, 4, 200, 200, head_dim)
    cache = ta.KVCache(2, 4, head_dim, config=ta.TurboConfig(bits=bits))
    ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert cache.head_bits is not None


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_offset_channels_and_a_huge_first_token(bits):
    """The properties that smoothing, rotation, sinks and token scales handle."""
    q, k, v = qkv(1, 4, 2, 200, 200, 64)
    k[..., :4] += 15.0
    k[:, :, 0] *= 20.0
    v[:, :, 0] *= 0.05
    ta.turbo_attention_with_kvcache(q, ta.KVCache(1, 2, 64, config=ta.TurboConfig(bits=bits)), k, v)


@pytest.mark.parametrize("place", [0, 70, 150])
def test_one_huge_token(place):
    q, k, v = qkv(1, 4, 2, 200, 200, 64)
    k[:, :, place] *= 10
    v[:, :, place] *= 1e4
    cache = ta.KVCache(1, 2, 64)
    out = ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert all(bool(x.isfinite().all()) for x in (out, *cache.dequantize()))
    assert cache.head_bits.tolist() == [[4, 4]] * 2


@pytest.mark.parametrize("bits", [4, 2])
def test_heads_without_variance(bits):
    q, k, v = qkv(1, 4, 4, 200, 200, 64)
    k[:, 0], v[:, 1], k[:, 2], v[:, 2] = 3.0, 0.0, 0.0, -2.0
    cache = ta.KVCache(1, 4, 64, config=ta.TurboConfig(bits=bits))
    out = ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert cache.head_bits.tolist() == [[bits] * 4] * 2
    assert not bool(out[:, 1].any())
