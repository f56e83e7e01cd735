"""Attention of few query rows over pages, sinks and tail rows, in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from .attending import OFF, both, filled, kernels_and_reference
from .tools import assert_close

from turboattention.kernels.triton import attention, configs  # isort: skip


SIGHTS = (
    {},
    {"window": 90},
    {"causal": False},
    {"window": 90, "causal": False},
    {"softcap": 2.0},
)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch):
    """As a device with many processors cuts."""
    monkeypatch.setattr(configs, "splits", lambda blocks, programs, held: max(1, min(blocks, 3)))


def tokens_for(cache: KVCache, heads: int, tokens: int, dtype: torch.dtype = torch.float32):
    """q and new (k, v)."""
    shape = cache.batch_size, heads, cache.num_kv_heads, tokens, tokens, cache.head_dim
    q, k, v = qkv(*shape, seed=1, dtype=dtype)
    return q, cache, (k, v)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, "mixed", (8, 2), (2, 4), (3, 8)], ids=str)
def test_widths(bits):
    cache = filled([200], 64, OFF.replace(bits=bits))
    both(*tokens_for(cache, 4, 1))


@pytest.mark.parametrize("head_dim", [8, 24, 96, 128, 256])
def test_head_dims(head_dim):
    both(*tokens_for(filled([130], head_dim, OFF.replace(bits=8), heads=1), 2, 1))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_keys_in_their_order(head_dim, bits):
    """A head of two widths, where octets halve, and one of one; behind a sink block, which has no order."""
    cache = filled([200], head_dim, OFF.replace(bits=bits, reorder_k=True))
    assert cache.page_table.counts.tolist() == [3]
    assert cache.page_table.pools.compressed.layout.k_halves == (() if head_dim % 16 else (True, False))
    assert (cache.k_order is None) == bool(head_dim % 16)
    both(*tokens_for(cache, 4, 1))


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 24), (3, 64), (2, 96), (4, 128)])
def test_rotated_keys(bits, head_dim):
    cache = filled([200], head_dim, OFF.replace(bits=bits))
    assert cache.k_order is None
    both(*tokens_for(cache, 4, 1))


@pytest.mark.parametrize("given", [[8, 4, 3, 2], [[2, 8, 4, 3], [4, 2, 8, 3]]], ids=str)
def test_widths_of_heads(given):
    for head_dim in (24, 48):
        both(*tokens_for(filled([150], head_dim, heads=4, head_bits=given), 8, 1))


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.usefixtures("split")
def test_ragged_lengths(options):
    cache = filled([0, 63, 64, 200, 330])
    both(normals(5, 4, 2, 16), cache, **options)
    both(*tokens_for(cache, 4, 3), **options)


@pytest.mark.usefixtures("split")
def test_padding_and_any_position():
    q, cache, new = tokens_for(filled([70, 200, 129, 0]), 4, 3)
    out, lse = both(q, cache, new, valid=torch.tensor([3, 0, 1, 2]))
    assert not bool(out[1].any())
    assert bool((lse[1] == -torch.inf).all())
    for options in ({}, {"window": 50}, {"causal": False, "window": 50}):
        both(q, cache, first=torch.tensor([0, 150, 64, -1]), **options)
    out, lse = both(q, cache, first=torch.tensor([-5, 3, -2, 0]))
    assert bool((lse[0] == -torch.inf).all())
    assert bool((lse[2, :, :2] == -torch.inf).all())
    assert bool((lse[2, :, 2] > -torch.inf).all())


@pytest.mark.parametrize("group", [1, 3, 8, 17, 20])
def test_groups(group):
    """The last ones take more than one program."""
    both(*tokens_for(filled([150], heads=1), group, 1))


@pytest.mark.parametrize("form", ["sas", "sas2", "exp"])
@pytest.mark.parametrize("p_scale", ["static", "row"])
@pytest.mark.parametrize("threshold", [-6.0, -2.5])
def test_softmax(form, threshold, p_scale):
    cache = filled([200], config=OFF.replace(softmax=form, sas_threshold=threshold, p_scale=p_scale))
    both(*tokens_for(cache, 4, 2))
    both(*tokens_for(cache, 4, 2), softcap=5.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"smooth_k": False},
        {"rotate": False},
        {"token_scales": False},
        {"sink_tokens": 0},
        {"reorder_k": True},
    ],
)
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.usefixtures("split")
def test_without_its_parts(fields, bits):
    cache = filled([60, 200], 24, config=OFF.replace(bits=bits, **fields))
    both(*tokens_for(cache, 4, 2))


@pytest.mark.parametrize("sink_tokens", [0, 128])
def test_a_given_mean_of_the_keys(sink_tokens):
    cache = filled([20, 210], config=OFF.replace(sink_tokens=sink_tokens), k_mean=normals(2, 16, seed=7) * 3)
    both(*tokens_for(cache, 4, 1))
    both(*tokens_for(cache, 4, 1), softcap=3.0)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.2])
def test_scales(scale):
    both(*tokens_for(filled([150]), 4, 2), scale=scale)


@pytest.mark.parametrize("window", [1, 64, 100])
@pytest.mark.usefixtures("split")
def test_evicted_pages(window):
    cache = filled([400, 30], window_size=window)
    assert not bool(cache.readable_pages(7)[0, 0])
    both(*tokens_for(cache, 4, 2), window=window)
    both(*tokens_for(cache, 4, 2), window=max(1, window // 2))


def test_an_evicted_page_is_not_seen():
    """Whatever a caller asks for: the kernel reads no page at address 0."""
    q, cache, new = tokens_for(filled([400], window_size=100), 4, 1)
    pages = cache.page_table.addresses()
    first = int((pages[0] != 0).nonzero()[0])
    window = 400 + 1 - 64 * first
    want = both(q, cache, new, window=window)
    got, _ = kernels_and_reference(q, cache, new)  # the reference takes what is gone for zeros
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 220), (1, 4, 3, 220), (3, 4, 3, 220)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks(shape, kind):
    q, cache, new = tokens_for(filled([215, 0, 100]), 4, 3)
    drawn = normals(*shape, seed=3)
    mask = drawn > -1 if kind == torch.bool else drawn.masked_fill(drawn > 1.5, -torch.inf).to(kind)
    both(q, cache, new, mask=mask)
    both(q, cache, new, mask=mask, causal=False, window=50, softcap=1.0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_mask_of_lowest_numbers():
    """A row that sees only such keys weighs them alike, as exact attention does; strides are the mask's own."""
    q, cache, new = tokens_for(filled([100]), 4, 2)
    mask = torch.full((1, 1, 2, 102), torch.finfo(torch.float32).min)
    mask[..., 0, 40:60] = 0.0
    both(q, cache, new, mask=mask)
    both(q, cache, new, mask=mask.transpose(2, 3).contiguous().transpose(2, 3))


def test_dtypes():
    q, cache, new = tokens_for(filled([100]), 4, 1, torch.float16)
    out, _ = both(q, cache, new)
    assert out.dtype == torch.float16
    # The interpreter truncates where a GPU rounds.
    (out, _), _ = kernels_and_reference(q.bfloat16(), cache, new)
    want, _ = both(q.bfloat16().float(), cache, new)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 5, 64])
@pytest.mark.parametrize("bits", [4, 2])
def test_splits(parts, bits, monkeypatch):
    """Some see nothing, and what their memory holds is not read."""
    monkeypatch.setattr(configs, "splits", lambda blocks, programs, held: parts)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan"))
                        if k.get("dtype") == torch.float32 else empty(*a, **k))  # fmt: skip
    both(*tokens_for(filled([500, 70], 32, OFF.replace(bits=bits), heads=1), 2, 2))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("masked", [1, 3])
def test_more_sequences_than_a_grid_has_programs(masked, monkeypatch):
    cache = filled([70, 0, 140], 16)
    q, _, new = tokens_for(cache, 4, 1)
    mask = normals(masked, 1, 1, 141, seed=4)
    want, _ = kernels_and_reference(q, cache, new, mask=mask)
    monkeypatch.setattr(configs, "LARGEST_GRID", 2)
    got, _ = kernels_and_reference(q, cache, new, mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_empty_batch_and_no_rows():
    both(normals(0, 4, 1, 16), filled([]))
    out, lse = both(normals(1, 4, 0, 16), filled([70]))
    assert (out.shape, lse.shape) == ((1, 4, 0, 16), (1, 4, 0))


def test_refusals():
    for fields in ({"block_size": 32}, {"row_max": "running"}, {"p_scale": "tile"}, {"rescale": "sas"}):
        config = ta.TurboConfig(**fields)
        assert attention.refusal(config, torch.float32)
    assert attention.refusal(OFF, torch.float64)
    assert attention.refusal(OFF, torch.bfloat16) is None
