"""Attention of many query rows, with and without a cache, by Triton's interpreter, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from .attending import OFF, both, filled
from .tools import prefill_both

from turboattention.params import AttentionParams  # isort: skip
from turboattention.impl.triton import attention as execution  # isort: skip
from turboattention.kernels.triton import configs, prefill_rows  # isort: skip


def prompt(lengths: list[int], heads: int, kv_heads: int, head_dim: int, config=OFF, dtype=torch.float32, **options):
    """A prompt attended without a cache before it: `both` of an empty one and all tokens as new."""
    tokens = max(lengths)
    q, k, v = qkv(len(lengths), heads, kv_heads, tokens, tokens, head_dim, seed=2, dtype=dtype)
    k[..., 1] += 4.0
    v[..., ::5, :] *= 6.0
    cache = KVCache(len(lengths), kv_heads, head_dim, config=config)
    return both(q, cache, (k, v), valid=torch.tensor(lengths), **options)


def tokens_for(cache: KVCache, heads: int, tokens: int, dtype: torch.dtype = torch.float32):
    """q and new (k, v)."""
    shape = cache.batch_size, heads, cache.num_kv_heads, tokens, tokens, cache.head_dim
    q, k, v = qkv(*shape, seed=1, dtype=dtype)
    return q, cache, (k, v)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 256])
def test_head_dims(head_dim):
    prompt([100], 2, 1, head_dim)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 50}, {"window": 50, "causal": False}, {"window": 1}, {"softcap": 2.0}],
    ids=str,
)
def test_visible_ranges(options):
    prompt([160, 30], 4, 2, 16, **options)


@pytest.mark.parametrize("group", [1, 3, 5])
def test_groups_and_ragged_batches(group):
    out, lse = prompt([70, 0, 129], 2 * group, 2, 16)
    assert bool((lse[1] == -torch.inf).all())
    assert not bool(out[0, :, 70:].any())


@pytest.mark.parametrize("form", ["sas", "sas2", "exp"])
@pytest.mark.parametrize("p_scale", ["static", "row"])
@pytest.mark.parametrize("threshold", [-6.0, -2.5])
def test_softmax(form, threshold, p_scale):
    prompt([100], 2, 1, 32, OFF.replace(softmax=form, sas_threshold=threshold, p_scale=p_scale))


@pytest.mark.parametrize("group", [1, 2])
def test_rescaling_is_skipped_only_where_no_maximum_rises(group, monkeypatch):
    """Keys whose logits fall, rise, and do both: results are those of rescaling always, to the last bit."""
    q, k, v = qkv(1, group, 1, 260, 260, 16)
    k = k * torch.linspace(-1, 3, 260).abs()[:, None]
    got = prefill_both(q, k, v, is_causal=True)
    found = configs.architecture_of
    monkeypatch.setattr(configs, "architecture_of", lambda x: dataclasses.replace(found(x), skips_rescaling=False))
    want = prefill_both(q, k, v, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "fields", [{"smooth_k": False}, {"rotate": False}, {"token_scales": False}, {"bits": 3, "reorder_k": True}], ids=str
)
def test_without_its_parts(fields):
    prompt([150], 2, 1, 24, OFF.replace(**fields))


def test_dtypes():
    out, _ = prompt([70], 2, 1, 16, dtype=torch.float16)
    assert out.dtype == torch.float16


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.2])
def test_scales(scale):
    prompt([90], 2, 1, 16, scale=scale)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, "mixed", (8, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_chunks_over_a_cache(bits, head_dim):
    cache = filled([200, 70], head_dim, OFF.replace(bits=bits))
    both(*tokens_for(cache, 4, 40))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_keys_in_their_order(bits, head_dim):
    """A head of two widths, and one of one, behind a sink block."""
    cache = filled([140], head_dim, OFF.replace(bits=bits, reorder_k=True))
    assert cache.page_table.pools.compressed.layout.k_halves == (True, False)
    both(*tokens_for(cache, 4, 10))


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 24), (3, 64), (2, 96)])
def test_rotated_keys(bits, head_dim):
    both(*tokens_for(filled([140], head_dim, OFF.replace(bits=bits)), 4, 10))


@pytest.mark.parametrize("given", [[[2, 8, 4, 3], [4, 2, 8, 3]]], ids=str)
def test_widths_of_heads(given):
    for head_dim in (16, 24):
        both(*tokens_for(filled([150], head_dim, heads=4, head_bits=given), 8, 30))


@pytest.mark.parametrize("sink_tokens", [0, 128])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"causal": False}, {"softcap": 2.0}], ids=str)
def test_ragged_caches(sink_tokens, options):
    q, cache, new = tokens_for(filled([0, 1, 64, 200, 330], config=OFF.replace(sink_tokens=sink_tokens)), 4, 30)
    both(q, cache, new, **options)
    both(q, cache, new, valid=torch.tensor([30, 0, 7, 20, 1]), **options)


def test_any_position():
    """Rows in the middle of a cache, and rows before its first key."""
    q = normals(3, 4, 40, 16)
    cache = filled([200, 130, 64])
    for options in ({}, {"window": 60}):
        _, lse = both(q, cache, first=torch.tensor([100, 64, -10]), **options)
        assert bool((lse[2, :, :10] == -torch.inf).all())
        assert bool((lse[2, :, 10] > -torch.inf).all())


@pytest.mark.parametrize("window", [1, 100])
def test_evicted_pages(window):
    cache = filled([400, 30], window_size=window)
    assert not bool(cache.readable_pages(7)[0, 0])
    both(*tokens_for(cache, 4, 40), window=window)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 140), (1, 4, 40, 140), (2, 4, 40, 1)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks(shape, kind):
    q, cache, new = tokens_for(filled([100, 20]), 4, 40)
    drawn = normals(*shape, seed=3)
    mask = drawn > -1 if kind == torch.bool else drawn.masked_fill(drawn > 1.5, -torch.inf).to(kind)
    both(q, cache, new, mask=mask)
    both(q, cache, new, mask=mask, causal=False, window=50, softcap=1.0)


@pytest.mark.parametrize("blocks", [1, 7, 20])
def test_unpacked_in_parts(blocks, monkeypatch):
    """Of one KV head of one sequence at a time, of some, of all: the same to the last bit."""
    q, cache, new = tokens_for(filled([150, 60, 100], heads=3), 6, 20)
    whole = both(q, cache, new)
    monkeypatch.setattr(prefill_rows, "UNPACKED_BYTES", blocks * prefill_rows.bytes_per_block(64, 64))
    parts = both(q, cache, new)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_what_is_not_finite_makes_all_results_nan(side, parts, monkeypatch):
    """As on a GPU, where nobody waits to refuse it; also where the first heads are done before it is read."""
    if parts > 1:
        monkeypatch.setattr(prefill_rows, "UNPACKED_BYTES", 1)
    x = list(qkv(1, 4, 2, 70, 70, 16, seed=4))
    x[side][0, -1, 69, 3] = torch.inf
    monkeypatch.setattr(execution, "check_finite", lambda *_: None)
    out, lse = execution.prefill(*x, OFF, AttentionParams(True, 16**-0.5))
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


@pytest.mark.parametrize("head_dim, keys", [(16, 70), (24, 64), (40, 40), (256, 130)])
@pytest.mark.parametrize(
    "fields", [{}, {"smooth_k": False}, {"rotate": False}, {"bits": 3, "reorder_k": True}], ids=str
)
def test_a_prompt_without_a_cache_is_as_by_way_of_staged_rows(head_dim, keys, fields, monkeypatch):
    q, k, v = qkv(2, 4, 2, 40, keys, head_dim, seed=5)
    k[..., 1] += 4.0
    call = OFF.replace(**fields), AttentionParams(True, head_dim**-0.5)
    got = execution.prefill(q, k, v, *call)
    monkeypatch.setattr(execution, "takes_prefill_rows", lambda *_: False)
    want = execution.prefill(q, k, v, *call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
