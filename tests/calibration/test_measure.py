"""A layer's meter on tensors with known statistics."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.calibration import LayerMeter
from turboattention.config import WIDTHS
from turboattention.errors import InputError, NonFiniteError, ShapeError
from turboattention.flashq import head_priority
from turboattention.kv.channel_order import order_by
from turboattention.reference.exact import exact_attention

from ..helpers import normals, qkv, relative_error

LENGTH = 320


def text(seed: int = 0, group: int = 1, length: int = LENGTH):
    """q, k, v of two KV heads, and a gradient."""
    q, k, v = qkv(1, 2 * group, 2, length, length, 32, seed=seed)
    return q, k, v, normals(*q.shape, seed=99 + seed)


def measured(*texts, config=None, **options):
    meter = LayerMeter(config or ta.TurboConfig())
    for x in texts or (text(),):
        meter.add(*x, **options)
    return meter.statistics()


def test_shapes_and_order():
    found = measured(text(group=3))
    assert found.errors.shape == found.costs.shape == (2, 2, len(WIDTHS))
    assert (found.errors.dtype, found.k_mean.dtype) == (torch.float64, torch.float32)
    assert bool((found.errors.diff(dim=-1) < 0).all())
    assert bool((found.costs[..., 0] > 10 * found.costs[..., 3]).all())


def by_hand(q, k, v, gradient, bits, which, end=LENGTH, block=64):
    """Error and cost of the last block's queries, written out: everything before the block is read as stored."""
    cache = ta.KVCache(1, 2, 32, config=ta.TurboConfig(bits=bits, guard="off"))
    cache.append(k, v)
    stored = list(cache.dequantize())
    pair = [k[:, :, :end].clone(), v[:, :, :end].clone()]
    exact = exact_attention(q[:, :, end - block : end], *pair, is_causal=True)[0]
    pair[which][:, :, : end - block] = stored[which][:, :, : end - block]
    got = exact_attention(q[:, :, end - block : end], *pair, is_causal=True)[0]
    slope = gradient[:, :, end - block : end].double()
    change = ((got - exact) * slope).sum(-1)[0].unflatten(0, (2, -1)).sum(1)
    return got, exact, 0.5 * (change**2).mean(-1)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_errors_and_costs_by_hand(monkeypatch, which, bits):
    monkeypatch.setattr("turboattention.calibration.measure._PLACES", 1)
    # One place: where the shortest text ends.
    x = text(group=2)
    end = 192
    got, exact, cost = by_hand(*x, bits, which, end)
    found = measured(x)
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        wanted = relative_error(got[:, own], exact[:, own])
        assert float(found.errors[which, head, WIDTHS.index(bits)]) == pytest.approx(wanted, rel=1e-6)
    assert found.costs[which, :, WIDTHS.index(bits)].tolist() == pytest.approx(cost.tolist(), rel=1e-6)


def test_what_stands_near_the_query_costs_nothing():
    """Keys of the query's own block are in the buffer: attention that sees no others meets no error."""
    q, k, v, gradient = text()
    near = measured((q, k, v, gradient), window_size=1)
    assert float(near.errors.max()) == 0.0
    assert float(near.costs.max()) == 0.0
    some = measured((q, k, v, gradient), window_size=16)
    assert 0 < float(some.errors.max()) < float(measured().errors.max())


def test_a_head_that_nothing_follows_from_costs_nothing():
    q, k, v, gradient = text()
    gradient[:, 1] = 0
    found = measured((q, k, v, gradient))
    assert found.costs[:, 1].tolist() == [[0.0] * 4] * 2
    assert float(found.costs[:, 0].min()) > 0
    assert torch.equal(found.errors, measured().errors)


def test_texts_count_alike():
    one, other = text(0), text(1)
    both = measured(one, other)
    apart = [measured(one), measured(other)]
    for name in ("costs", "priority", "k_mean"):
        mean = sum(getattr(x, name) for x in apart) / 2
        assert torch.allclose(getattr(both, name), mean)


def test_priority_and_means_are_those_of_the_text():
    _, k, v, _ = x = text()
    found = measured(x)
    assert torch.allclose(found.priority[0], head_priority(k).double())
    assert torch.allclose(found.priority[1], head_priority(v).double())
    assert torch.allclose(found.k_mean, k[0].mean(1), atol=1e-6)


def test_weights_of_channels_are_energy_times_spread():
    """The variance inside the blocks after the sinks; differences between blocks are absorbed by zero points."""
    q, k, v, gradient = text(group=2, length=LENGTH + 5)
    k += 100 * torch.arange(LENGTH + 5)[:, None].div(64, rounding_mode="floor")
    found = measured((q, k, v, gradient)).k_weight
    energy = q[0].double().square().mean(1).unflatten(0, (2, 2)).mean(1)
    spread = k[0, :, 64:LENGTH].double().unflatten(1, (-1, 64)).var(2, correction=0).mean(1)
    assert torch.allclose(found, energy * spread, rtol=1e-6)


def test_texts_weigh_channels_together():
    one, other = text(0), text(1)
    one[0][..., 3] *= 100
    other[1][..., 3] *= 100
    weight = measured(one, other).k_weight
    assert weight.argmax(-1).tolist() == [3, 3]
    permutation = order_by(weight).permutation
    assert all(3 in row for row in permutation[:, : permutation.shape[1] // 2].tolist())


@pytest.mark.parametrize("bits", [4, 3])
def test_errors_are_those_of_keys_in_order_if_the_config_reorders(bits):
    q, k, v, gradient = text()
    k *= torch.logspace(0.5, -1, 32)
    plain, ordered = (measured((q, k, v, gradient), config=ta.TurboConfig(reorder_k=on)) for on in (False, True))
    at = WIDTHS.index(bits)
    assert float(ordered.errors[0, :, at].norm()) < 0.85 * float(plain.errors[0, :, at].norm())
    assert torch.equal(ordered.errors[1], plain.errors[1])
    assert torch.equal(ordered.k_weight, plain.k_weight)


def test_outlier_channels():
    q, k, v, gradient = text()
    k[:, 1, :, 5] *= 40
    k[:, 1, 7, 9] = 60.0
    assert measured((q, k, v, gradient)).outliers == ((), (5, 9))


def test_softcap_scale_and_learned_sinks_are_heeded():
    x = text()
    plain = measured(x).costs
    for options in ({"softcap": 2.0}, {"scale": 0.5}, {"sinks": torch.tensor([1.0, 2.0])}):
        assert not torch.allclose(measured(x, **options).costs, plain), options
    # A sink takes a share of the weight and carries nothing.
    taken = measured(x, sinks=torch.tensor([20.0, -40.0])).costs
    assert float(taken[:, 0].max()) < 1e-6
    assert torch.allclose(taken[:, 1], plain[:, 1])


def test_adverse_heads_are_measured_not_hidden():
    """A head without variance loses nothing; keys with one huge channel lose much, and more bits help."""
    q, k, v, gradient = text()
    k[:, 0], v[:, 0] = 0.25, 0.0
    k[:, 1, :, 0] += torch.where(torch.arange(LENGTH) % 2 == 0, -200.0, 200.0)
    q[..., 0] = 0
    found = measured((q, k, v, gradient))
    assert float(found.errors[:, 0].max()) == 0.0
    assert float(found.errors[0, 1, 0]) > 0.3
    assert float(found.errors[0, 1, 3]) < float(found.errors[0, 1, 0]) / 4


def test_short_texts_and_other_shapes_are_refused():
    meter = LayerMeter(ta.TurboConfig())
    assert meter.least_tokens == 192
    with pytest.raises(InputError, match="text: expected at least 192 tokens, got 191"):
        meter.add(*text(length=191))
    with pytest.raises(InputError, match="text: expected at least one, got none"):
        meter.statistics()
    q, k, v, gradient = text()
    with pytest.raises(
        ShapeError, match=r"gradient: expected shape \(1, 2, 320, 32\), as q and v give it, got \(1, 2, 319, 32\)"
    ):
        meter.add(q, k, v, gradient[:, :, 1:])


@pytest.mark.parametrize("index, name", [(1, "k"), (2, "v")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_refused(index, name, value):
    x = text()
    x[index][0, 1, 30, 3] = value
    meter = LayerMeter(ta.TurboConfig())
    with pytest.raises(NonFiniteError, match=rf"^{name}: "):
        meter.add(*x)
