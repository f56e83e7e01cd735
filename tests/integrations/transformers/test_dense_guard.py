"""The guard without a `TurboCache`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from turboattention import TurboConfig
from turboattention.errors import GuardWarning
from turboattention.integrations.transformers import TurboCache, dense_guard, disable, enable
from turboattention.integrations.transformers.dense_guard import _begun, _looked_at
from turboattention.reference.exact import exact_attention


@pytest.fixture(autouse=True)
def unseen():
    """Models are shared between tests."""
    _looked_at.clear()
    _begun.clear()


@pytest.fixture
def ruined(tiny):
    """A model whose layer 1 has keys of one large channel: logits beyond a thousand, which INT8 keys do not carry."""
    model = copy.deepcopy(tiny("llama"))  # other tests share it
    model.set_attn_implementation("turbo")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(40)
        attention.k_proj.weight.mul_(40)
    return model


@pytest.fixture
def only_warning():
    """Heads beyond INT8 are not computed in floating point."""
    enable(TurboConfig(guard="warn"))
    yield
    disable()
    enable()


def said(model, ids, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", GuardWarning)
        model(ids, **options)
    return [str(x.message) for x in caught if x.category is GuardWarning]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"use_cache": True}], ids=str)
@pytest.mark.usefixtures("only_warning")
def test_warns_once_of_the_layer(options, ruined, tokens):
    (message,) = said(ruined, tokens(2, 100), **options)
    assert message.startswith("layer 1: KV head")
    assert "bound 0.05" in message
    assert "another attn_implementation" in message
    assert said(ruined, tokens(2, 100), **options) == []


@pytest.mark.parametrize("padding", [0, 30, 99])
@pytest.mark.usefixtures("only_warning")
def test_with_padding(padding, ruined, tokens):
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, :padding] = 0
    assert len(said(ruined, tokens(2, 100), attention_mask=mask, use_cache=False)) == 1


def test_by_default_such_heads_are_exact(ruined, tokens):
    """The attention of layer 1, from the hidden states that layer 0 gives it."""
    outs = []
    ruined.model.layers[1].self_attn.register_forward_hook(lambda *call: outs.append(call[2][0]))
    hidden = ruined.model.layers[0].register_forward_hook(lambda *call: seen)
    ids, seen = tokens(2, 100), torch.randn(2, 100, ruined.config.hidden_size)
    assert said(ruined, ids, use_cache=False) == []
    ruined.set_attn_implementation("eager")
    assert said(ruined, ids, use_cache=False) == []
    hidden.remove()
    got, want = outs
    assert float((got - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_model_that_is_fine_is_not_talked_of(name, tiny, tokens):
    model = tiny(name)
    model.set_attn_implementation("turbo")
    assert said(model, tokens(2, 150), use_cache=False) == []
    assert all(any(x is module for x in _looked_at) for module in attentions(model))


def attentions(model) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def test_queries_of_few_keys_are_not_looked_at(ruined, tokens):
    assert said(ruined, tokens(1, 15), use_cache=False) == []
    assert not any(x is module for x in _looked_at for module in attentions(ruined))


@pytest.mark.parametrize(
    "length, options",
    [(31, {}), (5, {"max_new_tokens": 40}), (60, {"prefill_chunk_size": 7}), (60, {"prefill_chunk_size": 25})],
    ids=str,
)
def test_short_calls_are_looked_at_together(length, options, tiny, tokens, monkeypatch):
    """With a bound that layers of a sound model exceed, as below."""
    monkeypatch.setattr(dense_guard, "_BOUND", 0.006)
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    options = {"max_new_tokens": 2, "do_sample": False} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        model.generate(tokens(1, length), **options)
    messages = [str(x.message) for x in caught if x.category is GuardWarning]
    assert messages
    assert {message[:8] for message in messages} <= {"layer 0:", "layer 1:"}
    assert all(any(x is module for x in _looked_at) for module in attentions(model))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_short_calls_of_a_model_that_is_fine(name, tiny, tokens):
    model = tiny(name)
    model.set_attn_implementation("turbo")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        model.generate(tokens(1, 5), max_new_tokens=40, do_sample=False)
    assert all(any(x is module for x in _looked_at) for module in attentions(model))


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 40}, {"num_beams": 2}],
    ids=["dynamic", "static", "chunks", "beams"],
)
@pytest.mark.parametrize("length", [60, 150])
@pytest.mark.parametrize("padding", [0, 20])
def test_in_every_way_to_generate(options, length, padding, tiny, tokens, monkeypatch):
    """With a bound that the layers of a sound model exceed, of which the last attends most evenly."""
    monkeypatch.setattr(dense_guard, "_BOUND", 0.0065)
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    mask = torch.ones(1, length, dtype=torch.int64)
    mask[:, :padding] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        model.generate(tokens(1, length), attention_mask=mask, max_new_tokens=3, do_sample=False, **options)
    messages = [str(x.message) for x in caught if x.category is GuardWarning]
    assert messages
    assert {message[:8] for message in messages} <= {"layer 0:", "layer 1:"}
    assert all(any(x is module for x in _looked_at) for module in attentions(model))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 40}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_model_that_is_fine_generates_without_a_word(name, options, tiny, tokens):
    model = tiny(name)
    model.set_attn_implementation("turbo")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        model.generate(tokens(1, 100), max_new_tokens=2, do_sample=False, **options)
    assert all(any(x is module for x in _looked_at) for module in attentions(model))


def test_with_a_turbo_cache_its_own_guard_speaks(ruined, tokens):
    cache = TurboCache(ruined.config, TurboConfig(guard="off"))
    assert said(ruined, tokens(1, 100), past_key_values=cache) == []


def test_can_be_switched_off(ruined, tokens):
    enable(TurboConfig(guard="off"))
    try:
        assert said(ruined, tokens(1, 100), use_cache=False) == []
    finally:
        disable()
        enable()


def test_a_few_rows_are_looked_at(ruined, tokens, monkeypatch):
    """Not the prompt."""
    seen = []

    def note(q, k, *rest, **more):
        seen.append((q.shape[0], q.shape[2], k.shape[2]))
        return exact_attention(q, k, *rest, **more)

    monkeypatch.setattr(dense_guard, "exact_attention", note)
    said(ruined, tokens(2, 600), use_cache=False)
    assert set(seen) == {(1, 32, 512)}
