"""Baselines as `past_key_values`: the adapter is lossless, and each method generates and is counted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from turboattention import bundled
from turboattention.errors import InputError, UnsupportedError
from turboattention.evaluation.baselines import METHODS, parse_methods
from turboattention.evaluation.baselines.kivi import KiviKeys, KiviValues
from turboattention.evaluation.baselines.stream import Restored
from turboattention.evaluation.hf.baseline_cache import BaselineCache
from turboattention.evaluation.hf.subject import TransformersSubject
from turboattention.integrations.transformers import TurboCache
from turboattention.integrations.transformers.language_model import load

NEW = 10

BUNDLED = {
    # name: bits at 512 tokens, bounds of the mean KL over the 256 behind a prompt of 256. Windows are of 128 tokens, a
    # quarter. GEAR-L's factors take 1.25 bits in the prompt and 1 behind it, its scales of keys 1/8 and 1/2.
    "int8": (8.5, 1e-7, 1e-4),
    "int4": (4.5, 5e-4, 4e-3),
    "kivi-4": (0.25 * 16 / 2 + 0.875 * 5, 1e-6, 3e-4),
    "kivi-2": (0.25 * 16 / 2 + 0.875 * 3, 5e-4, 1e-2),
    "gear-l-4": (4 + (0.3125 + 0.25) / 2 + 1.125, 1e-5, 2e-3),
    "gear-l-2": (2 + 0.5 + 1.125, 2e-3, 3e-2),
    "turboquant-4": (4.25, 5e-4, 6e-3),
    "turboquant-3": (3.25, 3e-3, 3e-2),
    "saw-int4": (4.5, 5e-4, 5e-3),
    "saw-int4-kv": (4.5, 5e-4, 5e-3),
    "q4_0-hadamard": (4.5, 5e-4, 4e-3),
    "compander-4": (4.5, 5e-4, 4e-3),
    "compander-3": (3.5, 2e-3, 2e-2),
    "compander-2": (2.5, 1e-2, 1e-1),
    # Windows of 64 and 256 tokens, of 512; fitted to the very text.
    "oscar-2": (0.625 * 16 + 0.375 * 2.5, 1e-4, 3e-3),
    "kvarn-k4v2": (0.25 * 16 + 0.75 * 3.5625, 5e-4, 6e-3),
    "hf-fp8": (8.0, 1e-5, 4e-3),
}

APART = ("hf-quanto-4", "hf-quanto-2", "oscar-2")
"""quanto compiles C++ at its first use: minutes. OSCAR has to be fitted first."""


class Exact:
    """Quantizes nothing, in pieces of seven tokens."""

    def settled(self, length: int) -> int:
        return length - length % 7

    def __call__(self, x: Tensor, start: int) -> Restored:
        return Restored(x, 16 * x.numel())


class Lost(Exact):
    """Stores zeros."""

    def __call__(self, x: Tensor, start: int) -> Restored:
        return Restored(torch.zeros_like(x), 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_the_adapter_loses_nothing(tiny, tokens, padded, name, way) -> None:
    model = tiny(name, dtype="float64")
    rows = (33,) if "prompt_lookup_num_tokens" in way else (33, 20, 9)
    ids, mask = padded([tokens(1, n, seed=n) for n in rows])
    own, ours = (
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **way)
        for cache in (DynamicCache(config=model.config), BaselineCache(model.config, Exact(), Exact()))
    )
    assert torch.equal(own, ours)


def test_a_call_sees_its_own_tokens_exactly_and_older_ones_as_stored(tiny) -> None:
    layer = BaselineCache(tiny().config, Lost(), Exact()).layers[0]
    x = torch.rand(1, 2, 10, 64) + 1
    seen, _ = layer.update(x, x)
    assert torch.equal(seen, x)
    seen, values = layer.update(x[:, :, :1], x[:, :, :1])
    assert torch.equal(seen, torch.cat([0 * x[:, :, :7], x[:, :, 7:], x[:, :, :1]], 2))
    assert torch.equal(values, torch.cat([x, x[:, :, :1]], 2))


def test_a_step_copies_no_more_than_its_token(tiny) -> None:
    layer = BaselineCache(tiny().config, Exact(), Exact()).layers[0]
    x = torch.rand(1, 2, 100, 64)
    layer.update(x, x)
    places = {tuple(seen.data_ptr() for seen in layer.update(x[:, :, :1], x[:, :, :1])) for _ in range(25)}
    assert len(places) == 1


def test_a_copy_and_a_crop_have_memory_of_their_own(tiny) -> None:
    cache = BaselineCache(tiny().config, Exact(), Exact())
    x, y = torch.rand(1, 2, 20, 64), torch.rand(1, 2, 5, 64)
    for layer in range(3):
        cache.update(x, x, layer)
    other = copy.deepcopy(cache)
    other.crop(-10)
    assert torch.equal(other.layers[0].update(y, y)[0], torch.cat([x[:, :, :10], y], 2))
    assert torch.equal(cache.layers[0].update(y, y)[1], torch.cat([x, y], 2))
    cache.layers[1].batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].update(y.expand(2, 2, 5, 64), y.expand(2, 2, 5, 64))[0][1, :, :20], x[0])


def test_a_fitted_method_is_refused_before_it_is_fitted(tiny) -> None:
    with pytest.raises(InputError, match="methods: expected oscar-2 fitted to a model, got it unfitted"):
        METHODS["oscar-2"].make_cache(tiny().config)


def test_bits_count_codes_and_windows(tiny) -> None:
    cache = BaselineCache(tiny().config, KiviKeys(2), KiviValues(2))
    assert cache.bits_per_element == float("inf")
    x = torch.rand(2, 2, 300, 64)
    for layer in range(3):
        cache.update(x, x, layer)
    keys, values = (256 * 3 + 44 * 16) / 300, (172 * 3 + 128 * 16) / 300
    assert cache.bits_per_element == pytest.approx((keys + values) / 2)
    cache.crop(-50)
    values = (172 * 3 + 78 * 16) / 250
    assert cache.bits_per_element == pytest.approx((250 / 256 * 256 * 3 / 250 + values) / 2)
    cache.reset()
    assert cache.bits_per_element == float("inf")


@pytest.mark.parametrize("name", [m.name for m in parse_methods("all") if m.name not in APART])
def test_generates_for_a_left_padded_batch(tiny, tokens, padded, name) -> None:
    method, model = METHODS[name], tiny()
    model.set_attn_implementation(method.attention or "sdpa")
    # The longer one fills a compressed block, also behind a lag: until then the guard keeps a copy of the tokens.
    ids, mask = padded([tokens(1, n, seed=n) for n in (210, 40)])
    cache = method.make_cache(model.config)
    assert method.bits_per_element(cache) == float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guard, about random weights
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert out.shape == (2, 210 + NEW)
    assert 2 < method.bits_per_element(cache) <= 20
    if name in ("int8", "turbo-8"):
        own = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert (own == out).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_layers_count_as_16_bits(tiny, tokens, dtype) -> None:
    """Also in a float32 model, where they take 32: floating-point values of the other methods count as 16, too."""
    method, model = METHODS["turbo-4"], copy.deepcopy(tiny()).to(dtype)
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config, exact_layers=range(model.config.num_hidden_layers))
    assert method.bits_per_element(cache) == float("inf")
    with torch.no_grad():
        model(tokens(1, 64), past_key_values=cache)
    assert method.bits_per_element(cache) == 16
    assert cache.bits_per_element == 8 * dtype.itemsize


def test_refuses_what_a_key_value_cache_cannot_serve(tiny) -> None:
    config = tiny().config
    with pytest.raises(UnsupportedError, match="no sliding-window layers"):
        METHODS["hf-fp8"].make_cache(tiny("mistral").config)
    mla = type("Config", (type(config),), {"kv_lora_rank": 8})()
    with pytest.raises(UnsupportedError, match="multi-head latent attention"):
        METHODS["int4"].make_cache(mla)


@pytest.fixture(scope="module")
def language():
    return load(str(bundled.model_path()), dtype="float32")


@pytest.fixture(scope="module")
def decode(language):
    """Log probabilities [256, V] of the bundled text behind its first 256 tokens, in steps of 16, and the bits."""
    ids = torch.tensor([language.encode(bundled.text())[:512]])

    @torch.inference_mode()
    def run(name: str) -> tuple[Tensor, float]:
        method = TransformersSubject(language).fitted(METHODS[name])
        language.use(language.own_attention)
        cache, logits = method.make_cache(language.model.config), []
        for piece in ids.split([256] + [16] * 16, 1):
            logits.append(language.model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(logits)[256:].log_softmax(-1), method.bits_per_element(cache)

    return run


@pytest.fixture(scope="module")
def own(decode):
    return decode("fp16")


@pytest.mark.parametrize("name", BUNDLED)
def test_on_the_bundled_model(decode, own, name) -> None:
    expected, least, most = BUNDLED[name]
    got, bits = decode(name)
    exact, full = own
    assert full == 16
    assert bits == pytest.approx(expected, abs=0.01)
    divergence = (exact.exp() * (exact - got)).sum(-1).mean().item()
    assert least < divergence < most
