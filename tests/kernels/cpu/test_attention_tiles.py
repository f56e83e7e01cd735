"""The paper's running maximum and weight scales per tile, and its buffer: the C++ kernels against the reference."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.impl.cpu import steps as cpu_steps
from turboattention.kv.cache import KVCache
from turboattention.params import AttentionParams

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content
from .attending import assert_close, cache_both, prefill_both, unequal
from .tools import every_isa

PAPER = ta.TurboConfig.paper()
OFF = ta.TurboConfig(guard="off")
SIGHTS = (
    {},
    {"is_causal": True},
    {"is_causal": True, "window_size": 70},
    {"window_size": 30},
    {"is_causal": True, "softcap": 2.0},
)
FORMS = [
    {"softmax": name, "rescale": rescale} for name in ("sas", "sas2", "sas16", "exp") for rescale in ("exact", "sas")
]
ROWWISE = (
    PAPER,
    PAPER.replace(bits="mixed", search=True),
    PAPER.replace(bits=2, smooth_k=True, rotate=True, sink_tokens=64),
    OFF.replace(token_scales=False, bits=3),
)
rowwise = pytest.mark.parametrize("config", ROWWISE, ids=["paper", "mixed", "smoothed", "default"])


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 17, 63, 64, 65, 130, 300])
def test_tiles_of_every_length(queries, options):
    """Also more rows than one task takes, and tiles that begin in the middle of a vector of queries."""
    for heads, kv_heads, keys in ((2, 2, queries), (7, 1, queries + 70), (10, 1, 200)):
        prefill_both(*qkv(2, heads, kv_heads, queries, keys, 24, seed=keys), config=PAPER, **options)


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_every_exponential(fields):
    config = PAPER.replace(**fields)
    for queries in (1, 70):
        q, k, v = qkv(2, 4, 2, queries, 200, 16)
        for spread in (1.0, 6.0):
            prefill_both(q * spread, k, v, is_causal=True, config=config)


def test_one_scale_for_the_rows_of_a_tile():
    """A row with small weights among rows with large ones, which share its scale."""
    q, k, v = qkv(1, 1, 1, 64, 640, 16)
    q[:, :, :63] *= 8.0
    k[:, :, 64:] *= 0.1  # after the first block, weights of the first 63 rows are small
    together, _ = prefill_both(q, k, v, config=PAPER)
    alone, _ = prefill_both(q[:, :, 63:], k, v, config=PAPER)
    assert not torch.equal(together[:, :, 63:], alone)


@pytest.mark.parametrize("queries", [1, 3, 65])
def test_masks_and_rows_that_see_nothing(queries):
    """A block that a row does not see causes no rescaling, whose factor would be less than 1 with SAS."""
    q, k, v = qkv(2, 4, 2, queries, 200, 16)
    for mask in (torch.ones(2, 4, queries, 200, dtype=torch.bool), normals(2, 4, queries, 200)):
        unseen = False if mask.dtype == torch.bool else -torch.inf
        mask[0, 1], mask[1, :, queries // 2], mask[..., 64:128], mask[:, 2, :, :64] = unseen, unseen, unseen, unseen
        out, lse = prefill_both(q, k, v, mask, config=PAPER)
        for empty in ((0, 1), (1, slice(None), queries // 2)):
            assert not bool(out[empty].any())
            assert bool((lse[empty] == -torch.inf).all())


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_a_long_context_is_one_run_of_blocks(queries):
    """The running maximum of a block is that of all before it."""
    q, k, v = qkv(2, 2, 1, queries, 2100, 16)
    k[:, :, 64 * 20 :] *= 2.0
    prefill_both(q * 3, k, v, config=PAPER)


@rowwise
@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_over_a_cache(config, head_dim):
    cache = KVCache(3, 2, head_dim, config=config)
    k, v = normals(2, 3, 2, 300, head_dim, seed=9)
    cache.append(unequal(k), v, torch.tensor([40, 200, 300]))
    for tokens in (1, 5, 70):
        for options in ({}, {"window_size": 90}, {"is_causal": False}):
            q, k, v = qkv(3, 14, 2, tokens, tokens, head_dim, seed=tokens)
            cache_both(q, cache.clone(), k, v, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("counts", [[3, 1, 2], [70, 64, 5], [1, 0, 130]], ids=str)
def test_padding_does_not_share_a_tile(counts, causal, backend):
    """The largest logits are in the first block, so that later weights are small, except those of a row of zeros."""
    cache = KVCache(3, 2, 16, config=PAPER)
    k, v = normals(2, 3, 2, 300, 16)
    k[:, :, :10] += 1.0
    cache.append(k, v, torch.tensor([300, 20, 200]))
    q, k, v = qkv(3, 4, 2, max(counts), max(counts), 16)
    q += 1.0
    options = {"is_causal": causal, "return_lse": True, "backend": backend}
    whole = ta.turbo_attention_with_kvcache(q, cache.clone(), k, v, lengths=torch.tensor(counts), **options)
    for b, count in enumerate(counts):
        if not count:
            continue
        alone = cache.clone()
        alone.reorder(torch.tensor([b]))
        own = [x[b : b + 1, :, :count] for x in (q, k, v)]
        want = ta.turbo_attention_with_kvcache(own[0], alone, *own[1:], **options)
        assert_close((whole[0][b : b + 1, :, :count], whole[1][b : b + 1, :, :count]), want)


@rowwise
@every_isa
def test_tokens_few_by_few_give_the_bytes_of_stages(config, isa, monkeypatch):
    """Rows under the universal scale, of ragged sequences, with outliers that it clamps; and rows of a page that a crop
    brought back."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    cache = KVCache(3, 2, 24, config=config)
    cache.append(*normals(2, 3, 2, 260, 24), torch.tensor([130, 257, 191]))
    want = cache.clone()
    for turn, count in enumerate((1, 1, 62, 5, 63, 1, 1, 60, 63, 2)):
        if turn == 7:
            cache.crop(200)
            want.crop(200)
        k, v = normals(2, 3, 2, count, 24, seed=turn)
        k[:, :, ::3] *= 50.0
        v[:, :, ::4] *= 1e9
        v[:, :, 1::4] = 0.0
        assert cpu_steps.append(cache, k, v)
        append_by_stages(want, k, v)
        assert content(cache) == content(want)


@rowwise
def test_decode_steps_attend_like_the_reference(config):
    """Over blocks that fill; the step leaves the bytes that appending leaves."""
    cache = KVCache(3, 2, 16, config=config)
    cache.append(*normals(2, 3, 2, 200, 16), torch.tensor([191, 130, 128]))
    for turn in range(70):
        before = cache.clone()
        q, k, v = qkv(3, 4, 2, 1, 1, 16, seed=turn)
        cache_both(q, cache, k, v)
        append_by_stages(before, k, v)
        assert content(cache) == content(before)


def test_calls_that_a_step_does_not_take():
    """Rows of a tile, whole blocks of new tokens, and first tokens decide scales."""
    params = AttentionParams(is_causal=True, scale=0.25)
    cache = KVCache(2, 2, 16, config=PAPER)
    cache.append(*normals(2, 2, 2, 200, 16))
    q, k, v = qkv(2, 4, 2, 64, 64, 16)
    first = [x[:, :, :1] for x in (q, k, v)]
    assert cpu_steps.step(first[0], cache.clone(), *first[1:], params) is not None
    assert cpu_steps.step(q[:, :, :2], cache.clone(), k[:, :, :2], v[:, :, :2], params) is None
    assert not cpu_steps.append(cache, k, v)
    cache.crop(torch.tensor([200, 0]))
    assert cpu_steps.step(first[0], cache, *first[1:], params) is None
    assert not cpu_steps.append(cache, *first[1:])
