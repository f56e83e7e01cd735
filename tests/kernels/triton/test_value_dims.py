"""Values whose head_dim differs from that of the keys, in Triton's interpreter: attention is close to the reference,
stored pages and rows are bit-identical."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import tools  # noqa: F401  (skips without Triton)  # isort: skip

import turboattention as ta
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.kernels.triton import attention, configs, pages
from turboattention.kv.layout import PageLayout
from turboattention.kv.quantizer import PYTORCH

from ...helpers import normals
from ...kv.tools import append_by_stages, content
from .attending import OFF, both, filled
from .test_pages import MIXED, sides
from .tools import cache_both, prefill_both

DIMS = pytest.mark.parametrize("dims", [(192, 128), (24, 16), (16, 40), (8, 256), (256, 64)], ids=str)
FEW = pytest.mark.parametrize("dims", [(192, 128), (16, 40)], ids=str)


def tensors(dims: tuple[int, int], tokens: int, batch: int = 1, heads: int = 4, seed: int = 1) -> list[Tensor]:
    """q [B, Hq, L, D], k [B, 2, L, D], v [B, 2, L, Dv]."""
    shapes = ((heads, dims[0]), (2, dims[0]), (2, dims[1]))
    return [normals(batch, n, tokens, width, seed=seed + i) for i, (n, width) in enumerate(shapes)]


def of_cache(dims: tuple[int, int], bits: object, tokens: int, held: int = 150, **options: object) -> tuple:
    """q, a cache of a sink block, pages (one with 150 tokens) and tail rows, and new (k, v)."""
    cache = filled([held], dims[0], OFF.replace(bits=bits, **options), v_head_dim=dims[1])
    q, k, v = tensors(dims, tokens)
    return q, cache, (k, v)


@DIMS
def test_few_queries(dims):
    out, _ = both(*of_cache(dims, 4, 1))
    assert out.shape == (1, 4, 1, dims[1])


@pytest.mark.parametrize("bits", [8, 3, 2, "mixed", (2, 4)], ids=str)
def test_widths(bits):
    both(*of_cache((24, 16), bits, 1))
    both(*of_cache((16, 40), bits, 40))


@FEW
def test_keys_in_their_order(dims):
    for tokens in (1, 40):
        q, cache, new = of_cache(dims, 4, tokens, reorder_k=True)
        assert cache.k_order is not None
        both(q, cache, new)


def test_splits(monkeypatch):
    monkeypatch.setattr(configs, "splits", lambda blocks, programs, held: max(1, min(blocks, 3)))
    both(*of_cache((24, 40), 4, 2, held=400))
    both(*of_cache((40, 24), 4, 2, held=400), window=90)


@DIMS
def test_many_queries(dims):
    """Over pages, sinks, tail rows and new tokens; and without a cache, with blocks unpacked from fresh tokens."""
    assert attention.takes_prefill_rows(2, 40)
    both(*of_cache(dims, 4, 40))
    for causal in (True, False):
        out, _ = prefill_both(*tensors(dims, 100), is_causal=causal, config=OFF)
        assert out.shape == (1, 4, 100, dims[1])


@pytest.mark.parametrize("options", [{}, {"rotate": False, "smooth_k": False}, {"token_scales": False}], ids=str)
@pytest.mark.parametrize("dims", [(48, 32), (16, 40)], ids=str)
def test_what_is_stored(dims, options):
    """A prompt, then steps across block boundaries: the cache is bit-identical to that of PyTorch's stages."""
    config = OFF.replace(bits=4, reorder_k=False, **options)
    caches = [ta.KVCache(2, 2, dims[0], v_head_dim=dims[1], config=config) for _ in range(2)]
    for turn, count in enumerate([126, 1, 1, 1, 63, 2]):
        q, k, v = tensors(dims, count, batch=2, seed=100 * turn)
        cache_both(q, caches[0], k, v)
        append_by_stages(caches[1], k, v)
        assert content(caches[0]) == content(caches[1])


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_same_as_values_padded_by_zeros(tokens):
    """Without the rotation, results with channels of zeros appended are bit-identical."""
    q, k, v = tensors((48, 32), 200)
    new = slice(200 - tokens, None)

    def run(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
        cache = ta.KVCache(1, 2, 48, v_head_dim=width, config=OFF.replace(rotate=False, bits=4))
        cache.append(k[:, :, :-tokens], values[:, :, :-tokens])
        options = {"return_lse": True, "backend": "triton"}
        return ta.turbo_attention_with_kvcache(q[:, :, new], cache, k[:, :, new], values[:, :, new], **options)

    own, padded = run(v, 32), run(F.pad(v, (0, 16)), 48)
    assert torch.equal(padded[0][..., :32], own[0])
    assert not padded[0][..., 32:].any()
    assert torch.equal(padded[1], own[1])


@pytest.mark.parametrize("dims, halves", [((24, 40), ()), ((48, 16), (True, False, True, True))], ids=str)
@pytest.mark.parametrize("token_scales", [True, False])
def test_pages(dims, halves, token_scales):
    layout = PageLayout(dims[0], 64, *MIXED, token_scales, halves, v_head_dim=dims[1])
    k8, _, k_scale, _ = sides(PageLayout(dims[0], 64, *MIXED, token_scales), blocks=2)
    _, v8, _, v_scale = sides(PageLayout(dims[1], 64, *MIXED, token_scales), blocks=2)
    want = PYTORCH.encode_pages(layout, k8, v8, k_scale, v_scale, True)
    assert torch.equal(pages.encode_pages(layout, k8, v8, k_scale, v_scale, True), want)
    for a, b in zip(pages.decode_pages(layout, want), PYTORCH.decode_pages(layout, want), strict=True):
        assert torch.equal(a, b)


def test_steps_of_a_graph():
    """Uncaptured, as there is no device."""
    q, k, v = tensors((24, 40), 3)
    cache = filled([150], 24, OFF.replace(bits=4), v_head_dim=40, max_tokens=256)
    other = cache.clone()
    graph = DecodeGraph(cache, num_heads=4, capture=False)
    for t in range(3):
        now = slice(t, t + 1)
        new = [x[:, :, now] for x in (q, k, v)]
        out, _ = graph.step(*new)
        want = ta.turbo_attention_with_kvcache(new[0], other, *new[1:], backend="triton")
        assert torch.equal(out, want)


def test_queries_over_a_cache_without_tokens():
    cache = ta.KVCache(1, 2, 24, v_head_dim=16, config=OFF)
    out = ta.turbo_attention_with_kvcache(normals(1, 4, 3, 24), cache, backend="triton")
    assert out.shape == (1, 4, 3, 16)
    assert not out.any()
