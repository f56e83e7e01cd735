"""The order of K's channels: what it is learned from, that all of a cache follows it, and what it is good for."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.kv.channel_order import channel_order, query_energy, reorder, restore_order

from ..helpers import normals
from .tools import PLAIN, attend, content

HEADS, QUERY_HEADS, DIM = 2, 4, 32
ORDERED = PLAIN.replace(bits=3, reorder_k=True)


def problem(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one sequence, whose channels of K differ in spread and those of Q in another way."""
    generator = torch.Generator().manual_seed(seed)
    spread, energy = (torch.logspace(0.5, -1, DIM)[torch.randperm(DIM, generator=generator)] for _ in range(2))
    q = normals(1, QUERY_HEADS, length, DIM, seed=3 * seed) * energy
    k = normals(1, HEADS, length, DIM, seed=3 * seed + 1) * spread
    return q, k, normals(1, HEADS, length, DIM, seed=3 * seed + 2)


def fed(cuts: list[int], backend: str = "reference", config: ta.TurboConfig = ORDERED) -> ta.KVCache:
    q, k, v = problem(400)
    cache = ta.KVCache(1, HEADS, DIM, config=config)
    at = 0
    for count in cuts:
        part = slice(at, at + count)
        ta.turbo_attention_with_kvcache(q[:, :, part], cache, k[:, :, part], v[:, :, part], backend=backend)
        at += count
    return cache


def test_reordering_is_undone():
    x, order = normals(2, 3, 5, 8), torch.stack([torch.randperm(8) for _ in range(3)])
    moved = reorder(x, order, 1)
    assert torch.equal(moved[1, 2, 4], x[1, 2, 4][order[2]])
    assert torch.equal(restore_order(moved, order, 1), x)


def test_energy_counts_chosen_rows_of_all_query_heads():
    q = normals(2, 4, 3, 8)
    counted = torch.tensor([[True, True, False], [False, True, False]])
    rows = torch.cat([q[0, :, 0], q[0, :, 1], q[1, :, 1]]).double().view(3, 2, 2, 8)
    torch.testing.assert_close(query_energy(q, counted, 2), rows.square().sum((0, 2)))


def test_rows_that_do_not_count_may_hold_anything():
    q = normals(1, 2, 2, 8)
    q[:, :, 1] = torch.nan
    assert bool(query_energy(q, torch.tensor([[True, False]]), 1).isfinite().all())


def test_the_order_is_that_of_energy_times_spread():
    _, k, _ = problem(64)
    energy = torch.rand(HEADS, DIM, dtype=torch.float64)
    order = channel_order(k, energy).places
    weight = (k.double().var(2, correction=0).mean(0) * energy).gather(-1, order)
    assert bool((weight[:, :-1] >= weight[:, 1:]).all())
    spread = k.double().var(2, correction=0).mean(0)
    assert torch.equal(channel_order(k, None).places, spread.argsort(-1, descending=True))


def test_heads_of_alike_channels_keep_one_width():
    k = normals(1, 2, 64, DIM)
    k[:, 1, :, ::2] *= 3
    assert channel_order(k, None).halved.tolist() == [False, True]


@pytest.mark.parametrize("cuts", [[300], [100, 200], [1] * 130 + [170], [64, 64, 172]], ids=["1", "2", "130", "blocks"])
def test_the_order_does_not_depend_on_how_tokens_arrived(cuts):
    whole, cut = fed([300]), fed(cuts)
    assert whole.k_order is not None
    assert cut.k_order is not None
    assert torch.equal(cut.k_order, whole.k_order)


def test_before_the_first_compressed_block_there_is_no_order():
    assert fed([127]).k_order is None
    assert fed([128]).k_order is not None


@pytest.mark.parametrize("bits", [3, 2])
def test_tokens_stay_what_they_were_when_the_order_is_fixed(bits):
    """Sinks and buffer are rewritten in the new order: exactly."""
    config = ORDERED.replace(bits=bits)
    before = fed([120], config=config).dequantize()
    after = fed([120, 40], config=config).dequantize()
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, :64], y[:, :, :64])


def test_clones_made_before_the_order_was_fixed_keep_their_own():
    cache = fed([100])
    copy, (k, v) = cache.clone(), problem(400)[1:]
    want = copy.dequantize()
    cache.append(k[:, :, 100:300], v[:, :, 100:300])
    assert copy.k_order is None
    assert all(torch.equal(x, y) for x, y in zip(copy.dequantize(), want, strict=True))
    copy.append(k[:, :, 100:300], v[:, :, 100:300])
    assert content(copy) == content(cache)


@pytest.mark.parametrize("bits", [3, 2])
def test_attention_errs_less_with_it(bits):
    """Against rotated keys with one width, on channels that matter unequally."""
    q, k, v = problem(600, seed=1)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, -64:],
        *(x.repeat_interleave(QUERY_HEADS // HEADS, 1) for x in (k, v)),
        attn_mask=torch.arange(600) <= torch.arange(536, 600)[:, None],
    )
    errors = []
    for reorder_k in (True, False):
        cache = ta.KVCache(1, HEADS, DIM, config=PLAIN.replace(bits=(bits, 8), reorder_k=reorder_k))
        out = ta.turbo_attention_with_kvcache(q, cache, k, v, is_causal=True, backend="reference")
        out = ta.turbo_attention_with_kvcache(q[:, :, -64:], cache, is_causal=True, backend="reference")
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", [8, 4, "mixed", (4, 2)])
def test_wider_keys_are_rotated_and_not_reordered(bits):
    cache = fed([300], config=ORDERED.replace(bits=bits))
    assert cache.k_order is None
    assert not cache.learns_order


def test_a_loaded_cache_has_the_order(tmp_path):
    cache = fed([300])
    cache.save(tmp_path / "cache")
    loaded = ta.KVCache.load(tmp_path / "cache")
    assert loaded.k_order is not None
    assert cache.k_order is not None
    assert torch.equal(loaded.k_order, cache.k_order)
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))
