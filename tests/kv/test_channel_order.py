"""The order of K's channels: what it is learned from, that compressed pages follow it, and what it is good for."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.flashq import quantize_tokens, rotate
from turboattention.kv.channel_order import (
    ChannelOrder,
    channel_order,
    ordered_rows,
    query_energy,
    reorder,
    restore_order,
    unordered_rows,
)
from turboattention.kv.layout import K_HALVES

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
    weight = (k.double().var(2, correction=0).mean(0) * energy).gather(-1, order.long())
    assert bool((weight[:, :-1] >= weight[:, 1:]).all())
    spread = k.double().var(2, correction=0).mean(0)
    assert torch.equal(channel_order(k, None).places.long(), spread.argsort(-1, descending=True))


def test_heads_of_alike_channels_keep_one_width():
    k = normals(1, 2, 64, DIM)
    k[:, 1, :, ::2] *= 3
    assert channel_order(k, None).halved.tolist() == [False, True]


@pytest.mark.parametrize("cuts", [[300], [100, 200], [1] * 130 + [170], [64, 64, 172]], ids=["1", "2", "130", "blocks"])
def test_the_order_does_not_depend_on_how_tokens_arrived(cuts):
    whole, cut = fed([300]), fed(cuts)
    assert whole.k_order is not None
    assert cut.k_order is not None
    assert torch.equal(cut.k_order.places, whole.k_order.places)


def test_before_the_first_compressed_block_there_is_no_order():
    assert fed([127]).k_order is None
    assert fed([128]).k_order is not None


@pytest.mark.parametrize("config", [ORDERED, ORDERED.replace(rotate=False)], ids=["rotated", "not rotated"])
def test_int8_rows_are_those_of_a_cache_without_order(config):
    """Sinks, buffer and mean: bit for bit. The compressed pages differ."""
    ordered, plain = (fed([100, 200, 7], config=config.replace(reorder_k=on)) for on in (True, False))
    assert ordered.k_order is not None
    for cache in (ordered, plain):
        assert int(cache.page_counts) == 4
    for x, y in zip(both(ordered, 0, 1), both(plain, 0, 1), strict=True):
        assert torch.equal(x, y)
    state, wanted = (cache.state(torch.device("cpu")) for cache in (ordered, plain))
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(state.tail_tiles, name), getattr(wanted.tail_tiles, name))
    assert torch.equal(state.k_mean, wanted.k_mean)
    assert not torch.equal(both(ordered, 1, 2)[0], both(plain, 1, 2)[0])
    assert torch.equal(both(ordered, 1, 4)[1], both(plain, 1, 4)[1])


def both(cache: ta.KVCache, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pages, dequantized as stored."""
    return cache.page_tiles(first, last).floats()


def test_heads_without_two_widths_are_stored_as_without_order():
    q, k, v = problem(300)
    k[:, 1] = normals(1, 300, DIM, seed=5)
    q[:, 2:] = normals(1, 2, 300, DIM, seed=6)
    caches = []
    for reorder_k in (True, False):
        cache = ta.KVCache(1, HEADS, DIM, config=ORDERED.replace(reorder_k=reorder_k))
        out = ta.turbo_attention_with_kvcache(q, cache, k, v, is_causal=True, backend="reference")
        out = ta.turbo_attention_with_kvcache(q[:, :, -9:], cache, is_causal=True, backend="reference")
        caches.append((cache, out))
    (ordered, out), (plain, wanted) = caches
    assert ordered.k_order is not None
    assert ordered.k_order.halved.tolist() == [True, False]
    for x, y in zip(both(ordered, 0, 4), both(plain, 0, 4), strict=True):
        assert torch.equal(x[:, :, 1], y[:, :, 1])
    assert torch.equal(out[:, 2:], wanted[:, 2:])
    assert not torch.equal(out[:, :2], wanted[:, :2])


def test_ordered_rows_are_rotated_back_and_quantized_again():
    k8, scale = quantize_tokens(rotate(normals(3, 2, 16, DIM)))
    order = ChannelOrder(normals(2, DIM, seed=1).argsort(-1).to(torch.uint8), torch.tensor([True, False]))
    codes, scales = ordered_rows(k8, scale, order, True)
    back = rotate(k8.double() * scale.double()[..., None], inverse=True).float()
    wanted, wanted_scale = quantize_tokens(back[:, 0].gather(-1, order.places[0].long().expand(3, 16, -1)))
    assert torch.equal(codes[:, 0], wanted)
    assert torch.equal(scales[:, 0], wanted_scale)
    assert torch.equal(codes[:, 1], k8[:, 1])
    assert torch.equal(scales[:, 1], scale[:, 1])


@pytest.mark.parametrize("rotated", [True, False])
def test_unordered_rows_are_the_inverse_but_for_rounding(rotated):
    k8, scale = quantize_tokens(normals(3, 2, 16, DIM))
    order = ChannelOrder(normals(2, DIM, seed=1).argsort(-1).to(torch.uint8), torch.tensor([True, False]))
    codes, scales = unordered_rows(*ordered_rows(k8, scale, order, rotated), order, rotated)
    error = (codes * scales[..., None] - k8 * scale[..., None]).abs().amax(-1) / scale
    assert float(error.max()) < (2.5 if rotated else 1e-6)


def test_a_crop_into_an_ordered_page_keeps_its_tokens():
    cache = fed([300])
    before = cache.dequantize()
    cache.crop(150)
    assert int(cache.page_counts) == 2
    k, v = cache.dequantize()
    assert torch.equal(v, before[1][:, :, :150])
    assert float((k - before[0][:, :, :150]).norm() / k.norm()) < 0.01


def test_clones_made_before_the_order_was_fixed_keep_their_own():
    cache = fed([100])
    copy, (k, v) = cache.clone(), problem(400)[1:]
    want = copy.dequantize()
    cache.append(k[:, :, 100:300], v[:, :, 100:300])
    assert copy.k_order is None
    assert all(torch.equal(x, y) for x, y in zip(copy.dequantize(), want, strict=True))
    copy.append(k[:, :, 100:300], v[:, :, 100:300])
    assert content(copy) == content(cache)


@pytest.mark.parametrize("bits", sorted(K_HALVES))
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
    assert errors[0] < 0.85 * errors[1]


def test_keys_of_8_bits_have_no_order():
    cache = fed([300], config=ORDERED.replace(bits=(8, 4)))
    assert cache.k_order is None
    assert not cache.learns_order


def test_heads_that_are_given_8_bits_have_no_order():
    q, k, v = problem(300)
    cache = ta.KVCache(1, HEADS, DIM, config=ORDERED, head_bits=[3, 8])
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="reference")
    assert cache.k_order is not None
    assert cache.k_order.halved.tolist() == [True, False]


def test_a_loaded_cache_has_the_order(tmp_path):
    cache = fed([300])
    cache.save(tmp_path / "cache")
    loaded = ta.KVCache.load(tmp_path / "cache")
    assert loaded.k_order is not None
    assert cache.k_order is not None
    assert torch.equal(loaded.k_order.places, cache.k_order.places)
    assert torch.equal(loaded.k_order.halved, cache.k_order.halved)
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))
