"""A model calibrated, and caches that follow it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboattention import TurboConfig
from turboattention.calibration import Calibration, LayerMeter
from turboattention.errors import ConfigError, InputError, NonFiniteError, UnsupportedError
from turboattention.integrations.transformers import TurboCache, calibrate
from turboattention.integrations.transformers.calibration import collect

LENGTH = 208


_once: list[Calibration] = []


@pytest.fixture
def made(tiny, tokens) -> Calibration:
    if not _once:
        _once.append(calibrate(tiny("llama"), tokens(1, 2 * LENGTH)[0].tolist(), length=LENGTH))
    return _once[0]


def test_every_layer_is_measured(made):
    assert len(made.layers) == len(made.head_bits) == 3
    assert made.average_bits <= 3.0
    assert (made.provenance.tokens, made.provenance.length) == (2 * LENGTH, LENGTH)
    assert made.provenance.shape["head_dim"] == 64
    for layer in made.layers:
        assert bool((layer.errors > 0).all())
        assert bool((layer.costs > 0).all())


def test_the_same_text_gives_the_same(tiny, tokens, made):
    again = calibrate(tiny("llama"), tokens(1, 2 * LENGTH)[0].tolist(), length=LENGTH)
    assert all(torch.equal(a.costs, b.costs) for a, b in zip(made.layers, again.layers, strict=True))
    assert again.provenance == made.provenance
    other = calibrate(tiny("llama"), tokens(1, LENGTH, seed=3)[0].tolist(), length=LENGTH)
    assert other.provenance.text_hash != made.provenance.text_hash
    assert other.provenance.model_hash == made.provenance.model_hash


def test_costs_foretell_the_divergence(tiny, tokens, forward):
    """What calibration expects of a head at 2 bits is what decoding then loses, within a factor."""
    model, ids = tiny("llama"), tokens(1, 6 * LENGTH)
    made = calibrate(model, ids[0].tolist(), length=LENGTH)
    measured, expected = [], []
    own = forward(model, "eager", ids[:, :LENGTH]).log_softmax(-1)
    for layer in range(3):
        bits = [torch.full((2, 2), 8) for _ in range(3)]
        bits[layer] = torch.full((2, 2), 2)
        cache = TurboCache(model.config, TurboConfig(guard="off"), head_bits=bits)
        got = forward(model, "turbo", ids[:, :LENGTH], [64, 64, *[16] * 5], cache).log_softmax(-1)
        measured.append(float((own.exp() * (own - got)).sum(-1)[:, 128:].mean()))
        expected.append(float(made.layers[layer].costs[..., 0].sum()))
    assert all(0.2 < a / b < 5 for a, b in zip(measured, expected, strict=True)), (measured, expected)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "mistral", "qwen3"])
def test_windows_softcaps_and_learned_sinks(tiny, tokens, name):
    made = calibrate(tiny(name), tokens(1, LENGTH)[0].tolist(), length=LENGTH)
    TurboCache(tiny(name).config, calibration=made)
    assert all(bool(layer.costs.isfinite().all()) for layer in made.layers)


def test_layers_are_measured_as_they_attend(tiny, tokens, monkeypatch):
    """Windows, softcaps, scales and sinks reach the meter."""
    given = []

    def note(self, q, k, v, gradient, **options):
        given.append(options)

    monkeypatch.setattr(LayerMeter, "add", note)
    monkeypatch.setattr(LayerMeter, "statistics", lambda self: None)

    def options(name: str, option: str) -> list:
        given.clear()
        collect(tiny(name), tokens(1, LENGTH)[0].tolist(), length=LENGTH)
        return [x[option] for x in given]

    assert options("gemma3", "window_size") == [24, None, 24]
    assert options("gemma2", "softcap") == [50.0] * 3
    assert options("gemma2", "scale") == [256**-0.5] * 3
    assert [x.shape for x in options("gpt_oss", "sinks")] == [(4,)] * 3
    assert options("llama", "sinks") == [None] * 3


@pytest.mark.parametrize("attention", ["eager", "sdpa", "turbo"])
def test_the_model_is_left_as_it_was(tiny, tokens, attention, made):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    wanted = [p.requires_grad for p in model.parameters()]
    got = calibrate(model, tokens(1, 2 * LENGTH)[0].tolist(), length=LENGTH)
    assert model.config._attn_implementation == attention
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.allclose(a.costs, b.costs, rtol=0.05) for a, b in zip(got.layers, made.layers, strict=True))


def test_caches_take_its_widths(tiny, tokens, forward, made):
    model = tiny("llama")
    cache = TurboCache(model.config, calibration=made)
    forward(model, "turbo", tokens(1, 150), [100, 50], cache)
    assert cache.layers[0].config.bits == "mixed"
    assert [layer.kv.head_bits.tolist() for layer in cache.layers] == [bits.tolist() for bits in made.head_bits]


def test_widths_asked_for_by_number_are_kept(tiny, tokens, forward, made):
    model = tiny("llama")
    means = made.rechosen(3.0, means=True)
    cache = TurboCache(model.config, TurboConfig(bits=4, guard="off"), calibration=means)
    forward(model, "turbo", tokens(1, 150), None, cache)
    assert all(layer.kv.head_bits.unique().tolist() == [4] for layer in cache.layers)
    for layer, measured in zip(cache.layers, made.layers, strict=True):
        assert torch.allclose(layer.kv.given_mean.float(), measured.k_mean, atol=1e-6)


def test_without_smoothing_there_are_no_means(tiny, made):
    plain = TurboConfig(bits="mixed", smooth_k=False)
    cache = TurboCache(tiny("llama").config, plain, calibration=made.rechosen(3.0, means=True))
    assert cache.layers[0]._k_mean is None


def with_unequal_channels(made: Calibration) -> Calibration:
    """Random weights have channels alike: here the first head's differ, in each layer in another way."""
    weights = torch.ones(2, 64, dtype=torch.float64)
    weights[0] = torch.logspace(0, 3, 64)
    layers = (replace(layer, k_weight=weights.roll(index, -1)) for index, layer in enumerate(made.layers))
    return replace(made, layers=tuple(layers))


def test_orders_of_channels_come_from_it_where_the_config_reorders(tiny, tokens, forward, made):
    model, made = tiny("llama"), with_unequal_channels(made)
    config = TurboConfig(bits=3, reorder_k=True, guard="off")
    pages = []
    for seed in (1, 2):  # another first block
        cache = TurboCache(model.config, config, calibration=made)
        forward(model, "turbo", tokens(1, 150, seed=seed), None, cache)
        pages.append([layer.kv.k_order for layer in cache.layers])
    assert made.k_order is not None
    for order, *found in zip(made.k_order, *pages, strict=True):
        assert all(torch.equal(each.permutation, order.permutation) for each in found)
        assert all(each.halved.tolist() == [True, False] for each in found)
    plain = TurboCache(model.config, TurboConfig(bits=3), calibration=made)
    assert plain.layers[0]._k_order is None


def test_a_saved_cache_keeps_the_orders(tiny, tokens, forward, made, tmp_path):
    model, made = tiny("llama"), with_unequal_channels(made)
    cache = TurboCache(model.config, TurboConfig(bits=3, reorder_k=True, guard="off"), calibration=made)
    forward(model, "turbo", tokens(1, 100), None, cache)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache", model.config)
    loaded.reset()
    forward(model, "turbo", tokens(1, 150), None, loaded)
    assert made.k_order is not None
    for layer, order in zip(loaded.layers, made.k_order, strict=True):
        assert torch.equal(layer.kv.given_order.permutation, order.permutation)


def test_a_file_does_the_same(tiny, tmp_path, made):
    made.save(tmp_path)
    cache = TurboCache(tiny("llama").config, calibration=Calibration.load(tmp_path))
    assert [layer._head_bits.tolist() for layer in cache.layers] == [bits.tolist() for bits in made.head_bits]


# -- refusals ------------------------------------------------------------------------------------------


def test_another_models_calibration(tiny, made):
    with pytest.raises(
        ConfigError, match=r"calibration: expected one of this model \(model_type='qwen3'\), got one of"
    ):
        TurboCache(tiny("qwen3").config, calibration=made)


def test_what_is_no_calibration(tiny):
    with pytest.raises(ConfigError, match="calibration: expected a Calibration, got str"):
        TurboCache(tiny("llama").config, calibration="folder")


@pytest.mark.parametrize("name", ["head_bits", "k_mean", "k_order"])
def test_both_are_too_much(tiny, made, name):
    with pytest.raises(ConfigError, match=f"{name}: expected None with a calibration"):
        TurboCache(tiny("llama").config, calibration=made, **{name: [None] * 3})


def test_short_texts(tiny, tokens):
    with pytest.raises(InputError, match="text: expected at least 192 tokens, got 191"):
        calibrate(tiny("llama"), tokens(1, 191)[0].tolist())
    with pytest.raises(InputError, match="length: expected at least 192 tokens, got 100"):
        calibrate(tiny("llama"), tokens(1, 400)[0].tolist(), length=100)


def test_a_model_that_gives_nan(tiny, tokens):
    model = tiny("llama", seed=7)
    weight = model.model.layers[1].self_attn.v_proj.weight
    before = weight.data.clone()
    weight.data[0, 0] = torch.nan
    try:
        with pytest.raises(NonFiniteError, match=r"^layer 1, v: "):
            calibrate(model, tokens(1, LENGTH)[0].tolist())
    finally:
        weight.data.copy_(before)
    assert model.config._attn_implementation == "eager"


def test_models_that_caches_refuse(tiny, tokens):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="expected a decoder, got a model with an encoder"):
        calibrate(T5ForConditionalGeneration(config), [1] * 300)
