"""The order of K's channels: how it is determined, that compressed pages follow it, and its benefit."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.errors import ConfigError, DtypeError, InputError, ShapeError
from turboattention.flashq import quantize_tokens, rotate
from turboattention.kv.channel_order import (
    ChannelOrder,
    by_halves,
    channel_order,
    order_by,
    ordered_rows,
    packed,
    query_energy,
    reorder,
    restore_order,
    unordered_rows,
    unpacked,
)
from turboattention.kv.layout import K_HALVES

from ..helpers import normals
from .tools import PLAIN, attend, content, pages_of

HEADS, QUERY_HEADS, DIM = 2, 4, 32
ORDERED = PLAIN.replace(bits=3, reorder_k=True)


def problem(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one sequence, whose channels of K differ in spread and those of Q in another way."""
    generator = torch.Generator().manual_seed(seed)
    spread, energy = (torch.logspace(0.5, -1, DIM)[torch.randperm(DIM, generator=generator)] for _ in range(2))
    q = normals(1, QUERY_HEADS, length, DIM, seed=3 * seed) * energy
    k = normals(1, HEADS, length, DIM, seed=3 * seed + 1) * spread
    return q, k, normals(1, HEADS, length, DIM, seed=3 * seed + 2)


def fed(cuts: list[int], backend: str = "reference", config: ta.TurboConfig = ORDERED, **options) -> ta.KVCache:
    q, k, v = problem(400)
    cache = ta.KVCache(1, HEADS, DIM, config=config, **options)
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


def test_the_first_half_has_the_largest_energy_times_spread():
    _, k, _ = problem(64)
    energy = torch.rand(HEADS, DIM, dtype=torch.float64)
    order = channel_order(k, energy).permutation.long()
    weight = (k.double().var(2, correction=0).mean(0) * energy).gather(-1, order)
    assert bool((weight[:, : DIM // 2].amin(1) >= weight[:, DIM // 2 :].amax(1)).all())
    ascending = order.unflatten(-1, (2, -1)).diff()
    assert bool((ascending > 0).all())
    spread = k.double().var(2, correction=0).mean(0)
    largest = spread.argsort(-1, descending=True)[:, : DIM // 2].sort(-1).values
    assert torch.equal(channel_order(k, None).permutation[:, : DIM // 2].long(), largest)


@pytest.mark.parametrize("head_dim", [8, 48, 256, 512])
def test_an_order_is_kept_in_a_bit_for_each_channel(head_dim):
    weight = torch.rand(3, head_dim, generator=torch.Generator().manual_seed(0))
    order = order_by(weight).permutation
    assert packed(order).nbytes == 3 * head_dim // 8
    assert torch.equal(unpacked(packed(order), head_dim), order)
    older = weight.argsort(-1, descending=True).to(order.dtype)
    assert torch.equal(unpacked(packed(older), head_dim), older)
    assert torch.equal(by_halves(older), order)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_attention_does_not_depend_on_the_order_within_a_half(backend, monkeypatch):
    """Products of codes are integers, whose sums are exact."""
    ascending = fed([300], backend)

    def descending(keys: torch.Tensor, energy: torch.Tensor | None) -> ChannelOrder:
        order = channel_order(keys, energy)
        return order._replace(permutation=order.permutation.unflatten(-1, (2, -1)).flip(-1).flatten(-2))

    monkeypatch.setattr("turboattention.kv.compression.channel_order", descending)
    other = fed([300], backend)
    assert ascending.k_order is not None
    assert other.k_order is not None
    assert torch.equal(
        other.k_order.permutation.unflatten(-1, (2, -1)).flip(-1).flatten(-2), ascending.k_order.permutation
    )
    for now, then in zip(attend(other, QUERY_HEADS), attend(ascending, QUERY_HEADS), strict=True):
        assert torch.equal(now, then)
    for now, then in zip(other.dequantize(), ascending.dequantize(), strict=True):
        assert torch.equal(now, then)


def test_heads_of_alike_channels_keep_one_width():
    k = normals(1, 2, 64, DIM)
    k[:, 1, :, ::2] *= 3
    assert channel_order(k, None).halved.tolist() == [False, True]


@pytest.mark.parametrize("cuts", [[300], [100, 200], [1] * 130 + [170], [64, 64, 172]], ids=["1", "2", "130", "blocks"])
def test_the_order_does_not_depend_on_how_tokens_arrived(cuts):
    whole, cut = fed([300]), fed(cuts)
    assert whole.k_order is not None
    assert cut.k_order is not None
    assert torch.equal(cut.k_order.permutation, whole.k_order.permutation)


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
    wanted, wanted_scale = quantize_tokens(back[:, 0].gather(-1, order.permutation[0].long().expand(3, 16, -1)))
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
    assert torch.equal(loaded.k_order.permutation, cache.k_order.permutation)
    assert torch.equal(loaded.k_order.halved, cache.k_order.halved)
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))


# -- given orders ----------------------------------------------------------------------------------------


def with_order(order: ChannelOrder, cuts: list[int], backend: str = "reference", config=ORDERED) -> ta.KVCache:
    return fed(cuts, backend, config, k_order=order)


BACKENDS = ["reference", *(["cpu"] if ta.backends()["cpu"].usable else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[300], [100, 200, 7], [1] * 130], ids=["1", "3", "130"])
@pytest.mark.parametrize("config", [ORDERED, ORDERED.replace(stored_prefill=True)], ids=["tiles", "stored"])
def test_the_order_that_the_first_block_gives_stores_the_same(config, cuts, backend):
    found = fed(cuts, config=config)
    assert found.k_order is not None
    given = with_order(found.k_order, cuts, backend, config)
    assert not given.learns_order
    assert given.query_energy is None
    assert content(given) == content(found)
    want = attend(found, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(attend(given, backend=backend), want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_order_is_kept(backend):
    found = fed([300]).k_order
    assert found is not None
    other = ChannelOrder(found.permutation.flip(-1), torch.tensor([False, True]))
    cache = with_order(other, [300], backend)
    assert cache.k_order is not None
    assert torch.equal(cache.k_order.permutation, other.permutation)
    assert cache.k_order.halved.tolist() == [False, True]
    assert content(cache) == content(with_order(other, [300])) != content(fed([300]))


def test_bytes_do_not_depend_on_the_batch_with_a_given_order():
    order, alone = fed([300]).k_order, problem(400)
    assert order is not None
    q, k, v = (torch.cat((x.flip(-1), x))[:, :, :300] for x in alone)
    for given, same in ((order, True), (None, False)):
        cache = ta.KVCache(2, HEADS, DIM, config=ORDERED, k_order=given)
        ta.turbo_attention_with_kvcache(q, cache, k, v)
        assert (pages_of(cache, 1) == pages_of(with_order(order, [300]), 0)) == same


def test_orders_that_do_not_fit_are_refused():
    order = ChannelOrder(torch.arange(DIM).expand(HEADS, -1), torch.ones(HEADS, dtype=torch.bool))
    sizes = 1, HEADS, DIM
    for given, config, error, message in (
        (order, PLAIN, ConfigError, "expected none, because reorder_k is off, got an order"),
        (order.permutation, ORDERED, ConfigError, "expected a ChannelOrder, got Tensor"),
        (order.of_heads(slice(1)), ORDERED, ShapeError, r"expected shapes \(2, 32\) and \(2,\), got \(1, 32\) and"),
        (
            order._replace(permutation=order.permutation + 1),
            ORDERED,
            InputError,
            "expected a permutation of 32 channels for",
        ),
        (
            order._replace(permutation=order.permutation.float()),
            ORDERED,
            DtypeError,
            "expected integers and bool, got torch.float",
        ),
        (order._replace(halved=torch.ones(HEADS)), ORDERED, DtypeError, "expected integers and bool, got torch.int64"),
    ):
        with pytest.raises(error, match=f"^k_order: {message}"):
            ta.KVCache(*sizes, config=config, k_order=given)
    narrow = ChannelOrder(torch.arange(8).expand(HEADS, -1), torch.ones(HEADS, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^k_order: expected no heads of two widths at a head_dim of 8, which is not"):
        ta.KVCache(1, HEADS, 8, config=ORDERED, k_order=narrow)


def test_keys_of_8_bits_take_no_given_order():
    order = fed([300]).k_order
    assert order is not None
    config = ORDERED.replace(bits=(8, 4))
    assert content(with_order(order, [300], config=config)) == content(fed([300], config=config))


@pytest.mark.parametrize("length", [100, 300], ids=["before pages", "with pages"])
def test_a_loaded_cache_goes_on_with_the_given_order(length, tmp_path):
    order = fed([300]).k_order
    assert order is not None
    other = order._replace(permutation=order.permutation.flip(-1))
    cache = with_order(other, [length])
    cache.save(tmp_path / "cache")
    loaded, (k, v) = ta.KVCache.load(tmp_path / "cache"), problem(400)[1:]
    for each in (cache, loaded):
        each.append(k[:, :, length:], v[:, :, length:])
    assert content(loaded) == content(cache)
    assert loaded.k_order is not None
    assert torch.equal(loaded.k_order.permutation, other.permutation)


def test_a_given_order_is_counted(tmp_path):
    """In `nbytes`, beside that of the pages: they share no memory, in a loaded cache either."""
    order = fed([300]).k_order
    assert order is not None
    for cuts in ([100], [300]):
        cache, learned = with_order(order, cuts), fed(cuts)
        energy = 0 if learned.query_energy is None else learned.query_energy.nbytes
        assert cache.nbytes - (learned.nbytes - energy) == order.permutation.nbytes + order.halved.nbytes
        cache.save(tmp_path / "cache")
        assert ta.KVCache.load(tmp_path / "cache").nbytes == cache.nbytes
        assert cache.given_order is not None
        assert cache.k_order is None or cache.k_order.permutation.data_ptr() != cache.given_order.permutation.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_beyond_256_keep_their_number(backend):
    """A byte holds no more."""
    wide = 512
    order = ChannelOrder(torch.arange(wide).flip(0)[None], torch.tensor([True]))
    q, k, v = (normals(1, 1, 150, wide, seed=seed) for seed in range(3))
    cache = ta.KVCache(1, 1, wide, config=PLAIN.replace(bits=(4, 8), reorder_k=True), k_order=order)
    out = ta.turbo_attention_with_kvcache(q, cache, k, v, is_causal=True, backend=backend)
    assert cache.k_order is not None
    assert torch.equal(cache.k_order.permutation.long(), order.permutation)
    assert float((cache.dequantize()[0] - k).norm() / k.norm()) < 0.3
    assert out.isfinite().all()
