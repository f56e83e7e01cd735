"""After a crop, a selection or a window, a cache holds only the memory of its remaining tokens, in every kind of
layer."""

from __future__ import annotations

import pytest
import torch

from turboattention import TurboConfig
from turboattention.integrations.transformers import TurboCache

from .conftest import WINDOW

CONFIG = TurboConfig(block_size=16, sink_tokens=16, guard="off", search=False)
LONG, KEPT = 400, 60
KINDS = {"quantized": {}, "exact": {"exact_layers": [0, 1, 2]}, "both": {"exact_layers": [0]}}
RUN = 32
"""Positions that a sliding exact layer may hold in addition to its window."""


def held(thing: object, seen: dict[int, int]) -> int:
    """Bytes of every storage that an object keeps alive, without what kernels share between steps."""
    if isinstance(thing, torch.Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            held(part, seen)
    elif isinstance(thing, dict):
        held([*thing.values()], seen)
    elif type(thing).__module__.startswith("turboattention"):
        held([x for name, x in vars(thing).items() if name not in ("backend_state", "_addresses")], seen)
    return sum(seen.values())


def check(cache: TurboCache, anew: TurboCache) -> None:
    for layer, fresh in zip(cache.attention_layers, anew.attention_layers, strict=True):
        found, wanted = held(layer, {}), held(fresh, {})
        assert layer.nbytes == found
        run = 0 if layer.floats is None or layer.window is None else RUN * found // layer.floats.keys.shape[2]
        assert found <= 1.1 * wanted + run


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_crop(kind, recorded, tiny, tokens, forward):
    """Of full layers, or of sliding ones that recorded the past for it."""
    model = tiny("gemma3" if recorded else "llama")
    cache, anew = (TurboCache(model.config, CONFIG, **kind) for _ in range(2))
    if recorded:
        cache.activate_past_recording()
    forward(model, "turbo", tokens(2, LONG), None, cache)
    before = cache.nbytes
    cache.crop(KEPT)
    forward(model, "turbo", tokens(2, KEPT), None, anew)
    check(cache, anew)
    assert cache.nbytes < before / 3
    cache.batch_select_indices(torch.tensor([1]))
    anew = TurboCache(model.config, CONFIG, **kind)
    forward(model, "turbo", tokens(1, KEPT), None, anew)
    check(cache, anew)


@pytest.mark.parametrize("prompt", [67, 70, 75])
def test_a_crop_of_a_window_before_the_guard_has_decided(prompt, tiny, tokens, forward):
    """The guard compares all tokens when the first block after the sinks is compressed, whose window is long gone."""
    model, ids = tiny("gemma3"), tokens(2, 200)
    config = TurboConfig(block_size=16, sink_tokens=64, search=False)
    cache, whole = (TurboCache(model.config, config) for _ in range(2))
    forward(model, "turbo", ids, [prompt], cache)
    cache.crop(-2)
    found = forward(model, "turbo", ids, [200 - prompt + 2], cache)
    expected = forward(model, "turbo", ids, [prompt - 2, 200 - prompt + 2], whole)[:, prompt - 2 :]
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert cache.get_seq_length() == 200


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_crop_of_nothing_ends_a_recording(kind, tiny, tokens, forward):
    """As in transformers: the recorded tokens can be removed by one crop."""
    model = tiny("mistral")
    cache, anew = (TurboCache(model.config, CONFIG, **kind) for _ in range(2))
    cache.activate_past_recording()
    forward(model, "turbo", tokens(1, LONG), None, cache)
    cache.crop(0)
    assert cache.get_seq_length() == LONG
    forward(model, "turbo", tokens(1, LONG), None, anew)
    check(cache, anew)
    assert all(layer.nbytes < 2 * 2 * 4 * 128 * 2 * (WINDOW + 2 * RUN) for layer in cache.attention_layers)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_padding_that_is_cropped(kind, tiny, tokens, forward, padded):
    model = tiny("llama")
    ids, mask = padded([tokens(1, LONG), tokens(1, LONG - 10, seed=1)])
    cache, anew = (TurboCache(model.config, CONFIG, **kind) for _ in range(2))
    forward(model, "turbo", ids, None, cache, mask)
    cache.crop(KEPT)
    forward(model, "turbo", ids[:, :KEPT], None, anew, mask[:, :KEPT])
    check(cache, anew)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_that_wait_for_the_guard(name, tiny, tokens, forward):
    """Until it has seen a compressed block, it holds them at full precision."""
    model, config = tiny(name), TurboConfig(bits=4)
    cache, anew = (TurboCache(model.config, config) for _ in range(2))
    forward(model, "turbo", tokens(1, 100), None, cache)
    cache.crop(17)
    forward(model, "turbo", tokens(1, 17), None, anew)
    assert all(layer.floats is not None for layer in cache.attention_layers)
    check(cache, anew)


def test_what_was_cropped_goes_on_as_it_was(tiny, tokens, forward):
    model, ids = tiny("gemma3"), tokens(1, LONG)
    cache = TurboCache(model.config, CONFIG, exact_layers=[0, 1, 2])
    cache.activate_past_recording()
    forward(model, "turbo", ids, None, cache)
    cache.crop(300)
    other = torch.cat([ids[:, :300], tokens(1, 80, seed=1)], 1)
    expected = forward(model, "eager", other)[:, 300:]
    torch.testing.assert_close(forward(model, "turbo", other, [80], cache), expected, rtol=1e-4, atol=2e-5)
