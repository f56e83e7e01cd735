"""Layers kept in the model's own dtype: named, calibrated, or found by the guard."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from turboattention import Calibration, TurboConfig
from turboattention.errors import ConfigError, FormatError, GuardWarning, InputError, NonFiniteError
from turboattention.guard import BOUNDS
from turboattention.guard_sample import Sample
from turboattention.integrations.transformers import TurboCache, calibrate

MODELS = "llama mistral gemma2 gemma3 gpt_oss gpt2 llama4 gemma3n".split()
CONFIG = TurboConfig(bits=8, block_size=16, sink_tokens=16)
LENGTH = 90


@pytest.fixture
def ruined(tiny):
    """A model whose layer 1 has logits of thousands that differ little from key to key, as large biases make them:
    INT8 keys and queries do not carry these differences."""
    model = copy.deepcopy(tiny("llama", attention_bias=True))  # other tests share it
    attention = model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.bias.data.zero_()
        projection.bias.data.view(-1, 64)[:, 16] = 700  # a channel that turns slowly with the position
    return model


@pytest.fixture
def said(forward):
    """The logits of a forward, and what the guard said."""

    def run(model, ids, pieces, cache, mask=None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = forward(model, "turbo", ids, pieces, cache, mask)
        assert all(w.category is GuardWarning for w in caught)
        return logits, [str(w.message) for w in caught]

    return run


def every(model) -> range:
    return range(len(TurboCache(model.config).layers))


# -- named by the user -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[LENGTH], [60, 1, 1, 20, 1, 7]], ids=len)
def test_a_cache_of_exact_layers_is_the_models_own(name, pieces, tiny, tokens, forward):
    model, ids = tiny(name), tokens(2, LENGTH)
    expected = forward(model, "eager", ids, [LENGTH], DynamicCache(config=model.config))
    cache = TurboCache(model.config, exact_layers=every(model))
    torch.testing.assert_close(forward(model, "turbo", ids, pieces, cache), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding(name, tiny, tokens, forward, padded):
    model = tiny(name)
    rows = [tokens(1, 70), tokens(1, 41, seed=1), tokens(1, 18, seed=2)]
    ids, mask = padded(rows)
    result = forward(model, "turbo", ids, [50, 1, 19], TurboCache(model.config, exact_layers=every(model)), mask)
    for i, row in enumerate(rows):
        alone = forward(model, "eager", row)
        torch.testing.assert_close(result[i : i + 1, -row.shape[1] :], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_masks_of_the_users_own(name, tiny, tokens, forward):
    """Packed texts: boolean and additive, over everything."""
    model, ids = tiny(name), tokens(2, 40)
    part = torch.arange(40) // 20
    shown = ((part[:, None] == part) & torch.ones(40, 40, dtype=torch.bool).tril())[None, None]
    additive = torch.zeros(1, 1, 40, 40).masked_fill(~shown, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=additive, past_key_values=DynamicCache(config=model.config)).logits
        model.set_attn_implementation("turbo")
        for mask in (shown, additive):
            cache = TurboCache(model.config, exact_layers=every(model))
            result = model(ids, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pieces", [[20, 130], [45, 105], [70, 10, 70], [1] * 90 + [60]], ids=len)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_guard_judges_alike_however_tokens_arrive(name, pieces, tiny, tokens, said, monkeypatch):
    """Sinks of several blocks that fill in several calls; a window (of 24 tokens) that has released some of them when
    the first block behind them is compressed."""
    judged, errors = [], Sample.errors

    def record(sample, bits):
        judged.append(errors(sample, bits))
        return judged[-1]

    monkeypatch.setattr(Sample, "errors", record)
    model, ids = tiny(name), tokens(1, 150)
    found = []
    for split in ([150], pieces):
        judged.clear()
        cache = TurboCache(model.config, TurboConfig(bits=8, block_size=16, sink_tokens=64, exact_rows=0))
        assert said(model, ids, split, cache)[1] == []
        assert cache.exact_layers == ()
        found.append(torch.stack(judged))
    torch.testing.assert_close(found[1], found[0], rtol=0.5, atol=0)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2]], ids=str)
def test_the_others_stay_quantized(layers, tiny, tokens, forward):
    model, ids = tiny("llama"), tokens(2, LENGTH)
    cache = TurboCache(model.config, CONFIG, exact_layers=layers)
    forward(model, "turbo", ids, [60, 30], cache)
    assert cache.exact_layers == tuple(layers)
    plain = TurboCache(model.config, CONFIG)
    forward(model, "turbo", ids, [60, 30], plain)
    assert plain.exact_layers == ()
    assert cache.fp16_nbytes == plain.fp16_nbytes
    for exact, other in zip(cache.layers, plain.layers, strict=True):
        assert exact.nbytes == (2 * 4 * 2 * LENGTH * 2 * 64 if exact.index in layers else other.nbytes)


@pytest.mark.parametrize("layers", [[3], [-1], ["0"], [True], "0", 0, [0.0]], ids=repr)
def test_what_are_no_layers(layers, tiny):
    with pytest.raises(ConfigError, match=r"exact_layers: expected indices of layers from 0 to 2, got"):
        TurboCache(tiny("llama").config, exact_layers=layers)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generate(name, settings, tiny, tokens, padded, exact_core):
    model = tiny(name)
    ids = torch.cat([tokens(1, 12)] * 4, 1) if "num_beams" not in settings else tokens(2, 40)
    settings = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)} | settings
    model.set_attn_implementation("eager")
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config, exact_layers=[0, 1])
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


def test_in_half_precision(tiny, tokens, forward):
    model, ids = tiny("llama", dtype="bfloat16"), tokens(1, 40)
    cache = TurboCache(model.config, exact_layers=every(model))
    result = forward(model, "turbo", ids, [30, 10], cache)
    expected = forward(model, "sdpa", ids, [30, 10], DynamicCache(config=model.config))
    assert torch.equal(result, expected)
    assert cache.layers[0].floats.keys.dtype == torch.bfloat16


def test_a_window_keeps_little(tiny, tokens, forward):
    model = tiny("mistral")  # windows of 24
    cache = TurboCache(model.config, exact_layers=every(model))
    for start in range(0, 400, 40):
        forward(model, "turbo", tokens(1, 400), [40], cache)
        held = cache.layers[0].floats
        assert held.nbytes == 2 * 4 * 2 * 128 * held.keys.shape[2]
        assert held.keys.shape[2] < 24 + 32
        assert held.end == start + 40


def test_values_that_are_not_finite_never_enter(tiny, tokens, forward):
    model = copy.deepcopy(tiny("llama"))
    cache = TurboCache(model.config, CONFIG, exact_layers=[1])
    forward(model, "turbo", tokens(1, 40), [40], cache)
    before = cache.layers[1].floats
    model.model.layers[1].self_attn.k_proj.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="k_new"):
        forward(model, "turbo", tokens(1, 45), [5], cache)
    assert cache.layers[1].floats is before


# -- what caches do ----------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gemma3"])
def mixed(request, tiny):
    """A model and a cache with exact layers beside quantized ones; in Gemma 3, sliding ones."""
    model = tiny(request.param)
    return model, TurboCache(model.config, CONFIG.replace(guard="off"), exact_layers=[0, 1])


def test_crop_goes_back(mixed, tokens, forward):
    model, cache = mixed
    ids = tokens(2, LENGTH)
    forward(model, "turbo", ids, [60], cache)
    other = cache.clone()
    expected = forward(model, "turbo", ids, [10], cache)
    forward(model, "turbo", ids.flip(1), [9], other)
    other.crop(-9)
    torch.testing.assert_close(forward(model, "turbo", ids, [10], other), expected)


def test_a_crop_too_far_behind_a_window(tiny, tokens, forward):
    model = tiny("mistral")
    cache = TurboCache(model.config, CONFIG, exact_layers=[0])
    forward(model, "turbo", tokens(1, LENGTH), [60, 30], cache)
    with pytest.raises(InputError, match="expected a crop of at most 16 tokens with a window of 24"):
        cache.crop(-40)


def test_reorder_repeat_and_select(mixed, tokens, forward):
    model, cache = mixed
    ids = tokens(2, LENGTH)
    forward(model, "turbo", ids, [60], cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    order = [1, 1, 0]
    alone = TurboCache(model.config, CONFIG.replace(guard="off"), exact_layers=[0, 1])
    forward(model, "turbo", ids[order], [60], alone)
    expected = forward(model, "turbo", ids[order], [10], alone)
    torch.testing.assert_close(forward(model, "turbo", ids[order], [10], cache), expected)


def test_a_saved_cache_goes_on(mixed, tokens, forward, padded, tmp_path):
    model, cache = mixed
    ids, mask = padded([tokens(1, 60), tokens(1, 37, seed=1)])
    forward(model, "turbo", ids, [50], cache, mask)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache", model.config)
    assert loaded.exact_layers == (0, 1)
    assert (loaded.nbytes, loaded.fp16_nbytes, loaded.seq_lens.tolist()) == (
        cache.nbytes,
        cache.fp16_nbytes,
        [50, 27],
    )
    expected = forward(model, "turbo", ids, [9, 1], cache, mask)
    assert torch.equal(forward(model, "turbo", ids, [9, 1], loaded, mask), expected)
    loaded.reset()
    assert loaded.exact_layers == (0, 1)
    assert loaded.layers[0].config == cache.layers[0].config


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, layer: tensors.pop("layer0.exact_keys"),
        lambda tensors, layer: tensors.update({"layer0.exact_keys": tensors["layer0.exact_keys"][:, :, 1:]}),
        lambda tensors, layer: tensors.update({"layer0.exact_values": tensors["layer0.exact_values"] * torch.nan}),
        lambda tensors, layer: tensors.update({"layer0.exact_values": tensors["layer0.exact_values"].int()}),
        lambda tensors, layer: layer["exact"].update(first=3),
        lambda tensors, layer: layer["exact"].update(first=-3),
        lambda tensors, layer: layer["exact"].update(config="{}"),
    ],
)
def test_damaged_files(change, tiny, tokens, forward, tmp_path):
    model, path = tiny("llama"), tmp_path / "cache"
    cache = TurboCache(model.config, CONFIG, exact_layers=[0])
    forward(model, "turbo", tokens(1, 40), [40], cache)
    cache.save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    content = {key: json.loads(value) if value.startswith("{") else value for key, value in metadata.items()}
    whole = next(value for value in content.values() if isinstance(value, dict) and "turbo_cache" in value)
    change(tensors, whole["turbo_cache"]["layers"][0])
    save_file(
        {name: x.contiguous() for name, x in tensors.items()},
        path,
        {key: json.dumps(value) if isinstance(value, dict) else value for key, value in content.items()},
    )
    with pytest.raises((FormatError, NonFiniteError)):
        TurboCache.load(path)


# -- found by the guard ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pieces", [[LENGTH], [10, 20, 30, 30], [20, *[1] * 15, 55]], ids=len)
def test_the_guard_keeps_a_layer_that_int8_cannot_carry(bits, pieces, ruined, tokens, said, forward, distance):
    ids = tokens(2, LENGTH)
    cache = TurboCache(ruined.config, CONFIG.replace(bits=bits))
    _, messages = said(ruined, ids, pieces, cache)
    assert cache.exact_layers == (1,)
    (message,) = (x for x in messages if x.startswith("layer 1"))
    assert message.startswith("layer 1 is kept in the model's own dtype (float32): INT8 loses too much in KV head")
    assert "at 8 bits, bound 0.05)" in message
    assert "\n" not in message
    # Every token is exact, those of the calls before the decision too.
    own = DynamicCache(config=ruined.config)
    forward(ruined, "eager", ids, pieces, own)
    first = TurboCache(ruined.config, CONFIG.replace(bits=bits), exact_layers=[1])
    said(ruined, ids, pieces, first)
    held, wanted = cache.layers[1].floats, first.layers[1].floats
    assert held.keys.shape == own.layers[1].keys.shape
    assert distance(held.keys[:, :, :10], wanted.keys[:, :, :10]) < 1e-6


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_short_first_call_is_exact_already(bits, ruined, tokens, said, forward, distance):
    """No block is compressed before token 128, but INT8 would be attended from the first token on."""
    ids = tokens(1, LENGTH)
    cache = TurboCache(ruined.config, TurboConfig(bits=bits))
    result, messages = said(ruined, ids, [40, 50], cache)
    assert cache.exact_layers == (1,)
    (message,) = messages
    assert message.startswith(
        "layer 1 is kept in the model's own dtype (float32): INT8 loses too much in KV heads 0, 1"
    )
    assert message.endswith(f"bound {max(0.15, BOUNDS[bits] / 2):.2f})")
    named = TurboCache(ruined.config, TurboConfig(bits=bits), exact_layers=[1])
    assert torch.equal(said(ruined, ids, [40, 50], named)[0], result)
    assert distance(result, forward(ruined, "eager", ids)) < 0.1


def test_what_follows_is_as_good_as_with_the_layer_named(ruined, tokens, said, forward, distance):
    ids = tokens(1, LENGTH)
    expected = forward(ruined, "eager", ids)[:, 60:]
    errors = []
    for options in ({}, {"exact_layers": [1]}):
        cache = TurboCache(ruined.config, CONFIG, **options)
        errors.append(distance(said(ruined, ids, [60, 30], cache)[0][:, 60:], expected))
    given = TurboCache(ruined.config, CONFIG.replace(guard="off"))
    wrong = distance(said(ruined, ids, [60, 30], given)[0][:, 60:], expected)
    assert errors[0] == errors[1]
    assert errors[0] < 0.1 < wrong


def test_padded_sequences(ruined, tokens, said, padded):
    rows = [tokens(1, 70), tokens(1, 41, seed=1), tokens(1, 18, seed=2)]
    ids, mask = padded(rows)
    cache = TurboCache(ruined.config, CONFIG)
    said(ruined, ids, [25, 25, 1, 19], cache, mask)
    assert cache.exact_layers == (1,)
    named = TurboCache(ruined.config, CONFIG, exact_layers=[1])
    said(ruined, ids, [25, 25, 1, 19], named, mask)
    for held, wanted in zip(*(x.layers[1].floats.keys for x in (cache, named)), strict=True):
        assert torch.equal(held, wanted)
    assert cache.seq_lens.tolist() == [70, 41, 18]


def test_only_warns_where_it_may_not_change_anything(ruined, tokens, said):
    given = [[8, 8]] * 3
    for options in ({"config": CONFIG.replace(guard="warn")}, {"config": CONFIG, "head_bits": given}):
        cache = TurboCache(ruined.config, **options)
        _, messages = said(ruined, tokens(1, LENGTH), [LENGTH], cache)
        assert cache.exact_layers == ()
        (message,) = (x for x in messages if x.startswith("layer 1"))
        assert "8 bits are not enough: keep the layer in the model's own dtype (exact_layers" in message
        assert cache.layers[1].floats is None


@pytest.mark.parametrize("config", [CONFIG, TurboConfig()], ids=["at a block", "before"])
def test_a_warning_that_is_an_error_changes_nothing(config, ruined, tokens, forward):
    cache = TurboCache(ruined.config, config)
    forward(ruined, "turbo", tokens(1, 90), [20], cache)
    kv, before = cache.layers[1].kv, cache.layers[1].nbytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GuardWarning, match="layer 1 is kept"):
            forward(ruined, "turbo", tokens(1, 90), [70], cache)
    assert cache.layers[1].kv is kv
    assert kv.seq_lens.tolist() == [20]
    assert cache.layers[1].nbytes == before
    assert cache.layers[1].get_seq_length() == 20


def test_a_model_that_is_fine_keeps_no_floats(tiny, tokens, forward):
    model = tiny("llama")
    cache = TurboCache(model.config, CONFIG)
    forward(model, "turbo", tokens(1, 20), [20], cache)
    # Undecided, at 20 of 32 tokens: their keys and values (2 heads), and queries (4).
    assert all(layer.floats.nbytes == 4 * 20 * 64 * (2 + 2 + 4) for layer in cache.layers)
    forward(model, "turbo", tokens(1, 40), [20], cache)
    assert all(layer.floats is None for layer in cache.layers)
    assert cache.exact_layers == ()


def test_a_cache_saved_before_the_decision_still_decides(ruined, tokens, said, tmp_path):
    ids = tokens(1, LENGTH)
    cache = TurboCache(ruined.config, CONFIG)
    said(ruined, ids, [20], cache)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache", ruined.config)
    expected, messages = said(ruined, ids, [70], cache)
    result, again = said(ruined, ids, [70], loaded)
    assert torch.equal(result, expected)
    assert again == messages
    assert loaded.exact_layers == (1,)
    loaded.reset()
    assert loaded.exact_layers == ()


def test_copies_and_changes_before_the_decision(ruined, tokens, said):
    ids = tokens(2, LENGTH)
    cache = TurboCache(ruined.config, CONFIG)
    said(ruined, ids, [24], cache)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    other = cache.clone()
    flipped = ids.flip(0)
    expected, _ = said(ruined, flipped, [70], cache)
    assert torch.equal(said(ruined, flipped, [70], other)[0], expected)
    assert other.exact_layers == (1,)


def test_generate_over_a_layer_that_the_guard_keeps(ruined, tokens, said):
    ids = tokens(1, 20)
    results = []
    for cache in (TurboCache(ruined.config, CONFIG), TurboCache(ruined.config, CONFIG, exact_layers=[1])):
        ruined.set_attn_implementation("turbo")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuardWarning)
            out = ruined.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=30, do_sample=False
            )
        assert cache.exact_layers == (1,)
        results.append(out)
    assert results[0].shape == results[1].shape == (1, 50)


# -- calibrated --------------------------------------------------------------------------------------


def test_calibration_lists_them(ruined, tiny, tokens, said, tmp_path):
    text = tokens(1, 300)[0].tolist()
    made = calibrate(ruined, text, length=300, config=CONFIG)
    assert made.exact_layers == (1,)
    made.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded.exact_layers == (1,)
    assert loaded.rechosen(4.0).exact_layers == (1,)
    cache = TurboCache(ruined.config, calibration=loaded)
    assert cache.exact_layers == (1,)
    _, messages = said(ruined, tokens(1, 200), [200], cache)
    assert not any("layer 1" in x for x in messages)
    assert made.expected_kl < sum(float(x.sum()) for x in made.chosen_costs)
    assert calibrate(tiny("llama"), text, length=300, config=CONFIG).exact_layers == ()


def test_files_of_earlier_calibrations_and_damaged_ones(tiny, tokens, tmp_path):
    made = calibrate(tiny("llama"), tokens(1, 300)[0].tolist(), length=300, config=CONFIG)
    dataclasses.replace(made, exact_layers=(2, 0)).save(tmp_path)
    assert Calibration.load(tmp_path).exact_layers == (2, 0)
    path = tmp_path / "calibration.json"
    content = json.loads(path.read_text())
    del content["exact_layers"]
    path.write_text(json.dumps(content))
    assert Calibration.load(tmp_path).exact_layers == ()
    path.write_text(json.dumps(content | {"exact_layers": [3]}))
    with pytest.raises(FormatError, match="exact_layers"):
        Calibration.load(tmp_path)
