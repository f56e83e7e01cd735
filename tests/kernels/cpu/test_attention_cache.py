"""Attention over a cache: the C++ kernels against the reference, over pages of every width."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from . import tools  # noqa: F401
from .attending import cache_both, unequal

OFF = ta.TurboConfig(guard="off")
reordered = pytest.mark.parametrize("reorder_k", [True, False], ids=["reordered", "rotated"])
WIDTHS = (8, 4, 3, 2, "mixed", (8, 2), (2, 4), (3, 8))
SIGHTS = ({}, {"window_size": 90}, {"is_causal": False}, {"window_size": 90, "is_causal": False}, {"softcap": 2.0})


def filled(lengths: list[int], head_dim: int = 16, config: ta.TurboConfig = OFF, heads: int = 2, **options) -> KVCache:
    cache = KVCache(len(lengths), heads, head_dim, config=config, **options)
    if lengths and max(lengths):
        k, v = normals(2, len(lengths), heads, max(lengths), head_dim, seed=9)
        k = unequal(k)
        k[..., 1] += 4.0
        v[..., ::5, :] *= 6.0
        cache.append(k, v, torch.tensor(lengths))
    return cache


def poisoned(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    x = x.clone()
    for row, length in enumerate(lengths):
        x[row, :, length:] = torch.nan
    return x


@reordered
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 128, 256])
def test_widths_and_head_dims(bits, head_dim, reorder_k):
    """Decode, few rows, and more rows than are read from packed pages. Head_dims of 8, 24 and 40 have no halves."""
    cache = filled([200], head_dim, OFF.replace(bits=bits, reorder_k=reorder_k))
    two_widths = reorder_k and bits not in (8, (8, 2)) and head_dim % 16 == 0
    assert cache.page_table.pools.compressed.layout.k_halves == ((True, True) if two_widths else ())
    for tokens in (1, 3, 40):
        cache_both(*with_new(cache, 4, tokens))


@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_reordered_keys_of_every_group(bits, group):
    cache = filled([200, 130], 32, OFF.replace(bits=bits, reorder_k=True))
    for tokens in (1, 3, 20):
        cache_both(*with_new(cache, 2 * group, tokens))


def with_new(cache: KVCache, heads: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1):
    """q, a clone of the cache, k_new, v_new."""
    shape = cache.batch_size, heads, cache.num_kv_heads, tokens, tokens, cache.head_dim
    q, k, v = qkv(*shape, seed=seed, dtype=dtype)
    return q, cache.clone(), k, v


@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("options", SIGHTS, ids=str)
def test_ragged_lengths(bits, options):
    lengths = [0, 1, 63, 64, 65, 200, 500]
    cache = filled(lengths, config=OFF.replace(bits=bits))
    cache_both(normals(7, 4, 3, 16), cache, **options)
    for tokens in (1, 5, 30):
        cache_both(*with_new(cache, 4, tokens), **options)


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.parametrize("counts", [[0, 1, 2, 0, 1], [0, 3, 64, 1, 70], [5, 0, 40, 130, 17]], ids=str)
def test_padding_is_never_read(counts, options):
    cache = filled([0, 1, 65, 200, 129], heads=1)
    q, cache, k, v = with_new(cache, 2, max(counts))
    options = {"lengths": torch.tensor(counts), **options}
    clean, poison = cache.clone(), [poisoned(x, counts) for x in (q, k, v)]
    out, lse = cache_both(poison[0], cache, *poison[1:], **options)
    want = ta.turbo_attention_with_kvcache(q, clean, k, v, return_lse=True, backend="cpu", **options)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    for b, count in enumerate(counts):
        assert not bool(out[b, :, count:].any())
        assert bool((lse[b, :, count:] == -torch.inf).all())


@reordered
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 2])
def test_a_prompt_in_chunks_then_tokens(bits, dtype, reorder_k):
    """The order of the keys' channels is fixed by the seventh call, behind a page that stays INT8."""
    cache = KVCache(2, 2, 48, config=OFF.replace(bits=bits, reorder_k=reorder_k))
    q, k, v = qkv(2, 4, 2, 330, 330, 48, dtype=dtype)
    q = q * torch.logspace(0, -1, 48).to(dtype)  # the queries' energy decides
    start = 0
    for end in (1, 60, 64, 65, 100, 127, 200, 320, 321, 322, 330):
        out, _ = cache_both(*(x[:, :, start:end] for x in (q,)), cache, *(x[:, :, start:end] for x in (k, v)))
        assert out.dtype == dtype
        start = end
        assert (cache.k_order is not None) == (reorder_k and bits != 8 and end >= 128)


@pytest.mark.parametrize("sink_tokens", [0, 64, 128])
@pytest.mark.parametrize("bits", [4, (2, 3)], ids=str)
@pytest.mark.parametrize("flush_lag", [0, 100])
def test_sinks_and_lag(sink_tokens, bits, flush_lag):
    config = OFF.replace(bits=bits, sink_tokens=sink_tokens, flush_lag=flush_lag)
    cache = filled([60, 130, 300], config=config)
    for tokens in (1, 20, 70):
        cache_both(*with_new(cache, 4, tokens))


@pytest.mark.parametrize("given", [[8, 4, 3, 2], [[2, 8, 4, 3], [4, 2, 8, 3]]], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_given_head_bits(given, head_dim):
    cache = filled([300, 90], head_dim, heads=4, head_bits=given)
    for tokens in (1, 2, 30):
        cache_both(*with_new(cache, 8, tokens))


@pytest.mark.parametrize("fields", [{"smooth_k": False}, {"rotate": False}, {"token_scales": False}, {"search": False}])
@pytest.mark.parametrize("bits", [8, 3])
@reordered
def test_stage_1_without_its_parts(fields, bits, reorder_k):
    cache = filled([60, 300], config=OFF.replace(bits=bits, reorder_k=reorder_k, **fields))
    for tokens in (1, 5, 40):
        cache_both(*with_new(cache, 4, tokens))
        cache_both(*with_new(cache, 4, tokens), window_size=100, scale=0.7)


@pytest.mark.parametrize("sink_tokens", [0, 64])
def test_a_given_mean_of_the_keys(sink_tokens):
    mean = normals(2, 16, seed=7) * 3
    config = OFF.replace(sink_tokens=sink_tokens)
    cache = KVCache(2, 2, 16, config=config, k_mean=mean)
    cache_both(*with_new(cache, 4, 3))
    cache = filled([20, 200], config=config, k_mean=mean)
    for tokens in (1, 40):
        cache_both(*with_new(cache, 4, tokens))


@pytest.mark.parametrize("window", [1, 64, 100])
def test_evicted_pages(window):
    cache = filled([500, 30, 301], window_size=window)
    assert not bool(cache.readable_pages(7)[0, 0])
    for tokens in (1, 4, 50):
        cache_both(*with_new(cache, 4, tokens))
        cache_both(*with_new(cache, 4, tokens), window_size=max(1, window // 2))
    q, cache, k, v = with_new(cache, 4, 200)
    for at in range(0, 200, 40):
        cache_both(q[:, :, at : at + 40], cache, k[:, :, at : at + 40], v[:, :, at : at + 40])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 220), (1, 4, 5, 220), (3, 4, 5, 220), (5, 220), (5, 1)])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(shape, additive):
    """A column is a position: sequences that are shorter than the mask never see its end."""
    cache = filled([215, 0, 100])
    drawn = normals(*shape, seed=3)
    mask = drawn.masked_fill(drawn > 1.5, -torch.inf) if additive else drawn > -1
    for options in ({}, {"is_causal": False}, {"window_size": 50, "softcap": 1.0}):
        cache_both(*with_new(cache, 4, 5), attn_mask=mask, **options)
    many = torch.cat([mask] * 6, -2)[..., :24, :] if shape[-2] == 5 else mask
    cache = filled([196, 0, 100])
    cache_both(*with_new(cache, 4, 24), attn_mask=many)


def test_queries_alone():
    """Without new tokens, the last row is at the last key; rows before the first key see nothing."""
    cache = filled([300, 2, 0, 70])
    for queries in (1, 4, 40):
        out, lse = cache_both(normals(4, 4, queries, 16), cache)
        assert bool((lse[2] == -torch.inf).all())
        assert bool((lse[1, :, : max(0, queries - 2)] == -torch.inf).all())
    out, lse = cache_both(normals(4, 4, 0, 16), cache)
    assert (out.shape, lse.shape) == ((4, 4, 0, 16), (4, 4, 0))


@reordered
@pytest.mark.parametrize("queries", [1, 8, 60])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_long_caches(bits, queries, reorder_k):
    cache = filled([5000, 1100], 32, OFF.replace(bits=bits, reorder_k=reorder_k), heads=1)
    cache_both(*with_new(cache, 2, queries))
    cache_both(*with_new(cache, 2, queries), window_size=2500)


@pytest.mark.parametrize("bits", [4, "mixed"])
def test_changed_caches(bits, tmp_path):
    cache = filled([500, 200, 64, 130], config=OFF.replace(bits=bits))
    cropped = cache.clone()
    cropped.crop(torch.tensor([450, 200, 10, 0]))
    inside = cache.clone()
    inside.crop(100)
    other = cache.clone()
    other.reorder(torch.tensor([1, 1, 0, 3, 3]))
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors")
    for changed in (cropped, inside, other, loaded, cache):
        for tokens in (1, 5, 40):
            cache_both(*with_new(changed, 4, tokens))
    q, a, k, v = with_new(cache, 4, 3)
    b = KVCache.load(tmp_path / "cache.safetensors")
    got = (ta.turbo_attention_with_kvcache(q, c, k, v, return_lse=True, backend="cpu") for c in (a, b))
    assert all(torch.equal(x, y) for x, y in zip(*got, strict=True))


def test_an_empty_batch():
    cache = KVCache(0, 2, 16, config=OFF)
    q, k, v = qkv(0, 4, 2, 3, 3, 16)
    out, lse = cache_both(q, cache, k, v)
    assert (out.shape, lse.shape) == ((0, 4, 3, 16), (0, 4, 3))


@pytest.mark.parametrize("length", [1, 64, 200])
def test_prefill_through_an_empty_cache_is_attention_without_one(length):
    q, k, v = qkv(2, 4, 2, length, length, 24)
    want = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True, backend="cpu", config=OFF)
    got = cache_both(q, KVCache(2, 2, 24, config=OFF), k, v)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_many_sequences_give_what_each_gives_alone():
    """To the bit: where work is cut into runs of blocks depends on a sequence's own length."""
    lengths = [10, 6000, 300]
    cache = filled(lengths)
    q = normals(3, 4, 2, 16)
    out, lse = cache_both(q, cache)
    for b in range(3):
        alone = cache.clone()
        alone.reorder(torch.tensor([b]))
        one = ta.turbo_attention_with_kvcache(q[b : b + 1], alone, return_lse=True, backend="cpu")
        assert torch.equal(out[b : b + 1], one[0])
        assert torch.equal(lse[b : b + 1], one[1])
