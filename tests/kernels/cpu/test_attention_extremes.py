"""Inputs that strain the C++ attention: unequal scales, far maxima, equal scores."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache
from turboattention.reference.exact import exact_attention

from ...helpers import normals, qkv, relative_error
from . import tools  # noqa: F401
from .attending import cache_both, prefill_both

OFF = ta.TurboConfig(guard="off")
rows = pytest.mark.parametrize("queries", [1, 3, 40])
forms = pytest.mark.parametrize("softmax", ["sas", "sas2", "exp"])


def through_caches(q, k, v, config=OFF, **options):
    """The same keys as pages of every width, and as INT8."""
    prefill_both(q, k, v, config=config, **options)
    for bits in (8, 4, 3, 2):
        for reorder_k in (True, False):
            cache = KVCache(len(k), k.shape[1], k.shape[3], config=config.replace(bits=bits, reorder_k=reorder_k))
            cache.append(k, v)
            cache_both(q, cache, **options)


@rows
@pytest.mark.parametrize("ratio", [2.0**10, 2.0**17])
@pytest.mark.parametrize("p_scale", ["static", "row"])
def test_value_scales_far_apart_within_a_block(queries, ratio, p_scale):
    q, k, v = qkv(2, 2, 1, queries, 200, 16)
    v[:, :, 5::17] *= ratio
    config = OFF.replace(p_scale=p_scale)
    through_caches(q, k, v, config)
    v[:, :, 64:] /= 2.0**40  # and from block to block
    through_caches(q, k, v, config)


@rows
@forms
def test_heavy_weights_of_small_values(queries, softmax):
    """What a static scale rounds away: a key that takes nearly all weight, with a value a thousandth of the others'."""
    q, k, v = qkv(1, 2, 1, queries, 100, 16)
    q[..., 0] = 4.0
    k[:, :, ::50, 0] += 12.0
    v[:, :, ::50] /= 1000.0
    config = OFF.replace(softmax=softmax, sas_threshold=-40.0, p_scale="static")
    want = exact_attention(q, k, v)[0]
    out, _ = prefill_both(q, k, v, config=config.replace(p_scale="row"), flips=queries)
    coarse = ta.turbo_attention(q, k, v, config=config, backend="cpu")
    assert relative_error(out, want) < 0.05
    assert relative_error(coarse, want) > 0.2


@rows
def test_key_scales_far_apart_within_a_block(queries):
    q, k, v = qkv(2, 2, 1, queries, 200, 16)
    k[:, :, 3::9] *= 2.0**-10
    through_caches(q, k, v)


@rows
@pytest.mark.parametrize("at", [0, 70, 199])
def test_one_huge_logit(queries, at):
    """All weight on one key, wherever it comes: earlier results shrink to nothing, later ones count nothing."""
    q, k, v = qkv(2, 2, 1, queries, 200, 16)
    q[..., 0] = q[..., 0].abs() + 4
    k[:, :, at, 0] = 500.0
    out, lse = prefill_both(q, k, v, config=OFF)
    assert relative_error(out, v[:, :, at : at + 1].expand(out.shape)) < 0.02
    assert float(lse.min()) > 300
    through_caches(q, k, v)


@rows
@forms
def test_maxima_that_rise_and_fall_from_block_to_block(queries, softmax):
    q, k, v = qkv(1, 2, 1, queries, 640, 16)
    q[..., 0] = 4.0
    heights = torch.tensor([0.0, 9.0, -30.0, 8.0, 60.0, 59.0, -300.0, 300.0, 299.0, 0.0])
    k[..., 0] += heights.repeat_interleave(64)
    prefill_both(q, k, v, config=OFF.replace(softmax=softmax, smooth_k=False), flips=1)
    prefill_both(q, -k, v, config=OFF.replace(softmax=softmax), flips=1)


@rows
@forms
def test_equal_scores(queries, softmax):
    """Every weight is 1: the mean of the values, and the logarithm of how many there are."""
    config = OFF.replace(softmax=softmax)
    for keys in (1, 64, 100, 1500):
        q, k, v = qkv(1, 2, 1, queries, keys, 16)
        for given in ((torch.zeros_like(q), k), (q, torch.zeros_like(k))):
            out, lse = prefill_both(*given, v, config=config)
            assert float((out - v.mean(2, keepdim=True)).norm() / v.norm() * keys**0.5) < 0.05
            assert torch.allclose(lse, torch.tensor(float(keys)).log().expand(lse.shape), rtol=0, atol=1e-3)


@rows
def test_everything_zero(queries):
    zeros = [torch.zeros_like(x) for x in qkv(1, 2, 1, queries, 100, 16)]
    out, lse = prefill_both(*zeros)
    assert not bool(out.any())
    assert torch.allclose(lse, torch.full_like(lse, 100.0).log(), rtol=0, atol=1e-3)


@rows
def test_the_largest_codes(queries):
    """Integer sums at their limits: every product of a query and a key, a weight and a value, is the largest."""
    for sign in (1.0, -1.0):
        q, k, v = (
            torch.ones_like(x) * (5.0 if i == 0 else sign) for i, x in enumerate(qkv(1, 1, 1, queries, 192, 256))
        )
        config = OFF.replace(rotate=False, smooth_k=False)
        out, lse = prefill_both(q, k, v, config=config, scale=1e-3)
        assert relative_error(out, v[:, :, :1].expand(out.shape)) < 5e-3
        assert float((lse - sign * 1.28 - torch.tensor(192.0).log()).abs().max()) < 5e-3
        for bits in (8, 4, 3, 2):
            for reorder_k in (True, False):
                cache = KVCache(1, 1, 256, config=config.replace(bits=bits, reorder_k=reorder_k))
                cache.append(k, v)
                cache_both(q, cache, scale=1e-3)


@rows
def test_the_largest_steps(queries):
    """Keys between both ends of INT8, in channels that 1 and 3 bits hold too, under queries at their ends."""
    q, k, v = qkv(1, 1, 1, queries, 192, 256)
    q, k = q.sign() * 5.0, k.sign() * (119 / 128)  # codes of 119
    k[..., 128:] *= 0.55  # the half that gets 1 bit
    for bits in (4, 3, 2):
        for reorder_k in (True, False):
            config = OFF.replace(rotate=False, smooth_k=False, search=False, bits=bits, reorder_k=reorder_k)
            cache = KVCache(1, 1, 256, config=config)
            cache.append(k, v)
            cache_both(q, cache, scale=1e-2)
            if bits == 2 and reorder_k:
                layout = cache.page_table.pools.compressed.layout
                steps = cache.page_table.pools.compressed.gather([0])[0, layout.k_steps : layout.k_steps + 256]
                assert set(steps[128:].tolist()) == {127}


@rows
@pytest.mark.parametrize("size", [1e-17, 1e-6, 1e6, 1e15])
def test_tiny_and_huge_values(queries, size):
    q, k, v = qkv(1, 2, 1, queries, 100, 16)
    prefill_both(q, k, v * size)
    prefill_both(q * size, k / size, v)
    prefill_both(q * min(size, 1e6), k, v)


@rows
def test_masks_of_large_numbers(queries):
    """The usual substitutes for -inf; rows with only such values attend to all keys equally."""
    q, k, v = qkv(1, 2, 1, queries, 150, 16)
    for lowest in (-1e4, -1e9, torch.finfo(torch.float32).min):
        mask = torch.where(normals(queries, 150) > 0, 0.0, lowest)
        mask[queries // 2] = lowest
        mask[:, 64:128] = lowest
        prefill_both(q, k, v, mask)
        prefill_both(q, k, v, mask, is_causal=True, window_size=70)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_long_contexts_are_as_close_to_exact_attention_as_short_ones(head_dim):
    q, k, v = qkv(1, 4, 2, 2, 5000, head_dim)
    q = q * 2
    through_caches(q, k, v)
    out, lse = prefill_both(q, k, v, config=OFF)
    want, want_lse = exact_attention(q, k, v)
    assert relative_error(out, want) < 0.06
    assert float((lse - want_lse).abs().max()) < 0.05
