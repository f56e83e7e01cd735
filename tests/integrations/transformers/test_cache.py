"""`TurboCache` as transformers and users handle it: lengths, crops, rows, copies, sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import Cache

from turboattention import TurboConfig
from turboattention.errors import ConfigError, InputError
from turboattention.integrations.transformers import TurboCache

SMALL = TurboConfig(bits=4, block_size=16, sink_tokens=16, guard="off")


@pytest.fixture
def model(tiny):
    return tiny("llama", dtype="float64")


@pytest.fixture
def filled(model, forward, tokens):
    """A cache of three rows of 40 tokens."""
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", tokens(3, 40), [40], cache)
    return cache


def contents(cache, row):
    return [x[row] for layer in cache.layers for x in layer.kv.dequantize()]


def test_lengths_and_sizes(model, filled):
    assert isinstance(filled, Cache)
    assert (filled.get_seq_length(), filled.batch_size, len(filled)) == (40, 3, 3)
    assert filled.seq_lens.tolist() == [40, 40, 40]
    assert filled.get_mask_sizes(5, 0) == (45, 0)
    assert filled.get_query_offset() == 40
    assert filled.get_max_length() == -1
    assert not filled.is_compileable
    assert filled.nbytes == sum(layer.kv.nbytes for layer in filled.layers)
    assert filled.fp16_nbytes == 3 * 4 * 3 * 40 * 2 * 64
    assert filled.bits_per_element == pytest.approx(filled.nbytes * 16 / filled.fp16_nbytes)
    assert "length=40" in repr(filled)


def test_an_empty_cache(model):
    cache = TurboCache(model.config)
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes, cache.fp16_nbytes) == (0, -1, 0, 0)
    assert cache.bits_per_element == float("inf")
    assert cache.seq_lens.tolist() == []
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0


def test_long_caches_are_small(model, forward, tokens):
    cache = TurboCache(model.config, TurboConfig(guard="off"))
    forward(model, "turbo", tokens(1, 500), [500], cache)
    assert cache.bits_per_element < 8


def test_a_window_counts_once(tiny, forward, tokens):
    model = tiny("mistral")
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", tokens(1, 90), [90], cache)
    assert cache.fp16_nbytes == 3 * 4 * 24 * 2 * 128
    held = cache.layers[0].kv.readable_pages(5)
    assert held.tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("argument", [-7, 33, torch.tensor(-7)])
def test_crop(argument, model, filled, forward, tokens):
    filled.crop(argument)
    assert filled.get_seq_length() == 33
    ids = torch.cat([tokens(3, 40)[:, :33], tokens(3, 5, seed=1)], 1)
    result = forward(model, "turbo", ids, [5], filled)
    fresh = TurboCache(model.config, SMALL)
    expected = forward(model, "turbo", ids, [33, 5], fresh)[:, 33:]
    assert float((result - expected).norm() / expected.norm()) < 0.1
    filled.crop(0)
    filled.crop(-100)
    assert filled.get_seq_length() == 0


def test_recording_the_past_allows_deep_crops_of_windows(tiny, forward, tokens):
    model = tiny("mistral")
    ids = tokens(1, 200)
    for record in (False, True):
        cache = TurboCache(model.config, SMALL)
        if record:
            cache.activate_past_recording()
        forward(model, "turbo", ids, [100, 100], cache)
        if record:
            cache.crop(-100)
            forward(model, "turbo", ids[:, :150], [50], cache)
            forward(model, "turbo", ids[:, :151], [1], cache)
            pages = cache.layers[0].kv.readable_pages(9)
            assert not pages[:, :6].any(), "a forward of one token lets go of the rest"
        else:
            with pytest.raises(InputError, match="length"):
                cache.crop(-100)


def test_rows(model, filled, forward, tokens):
    ids, picked = tokens(3, 40), torch.tensor([2, 0, 0, 1])
    rows = [contents(filled, i) for i in range(3)]
    filled.reorder_cache(picked)
    assert filled.batch_size == 4
    more = torch.cat([ids[picked], tokens(4, 30, seed=1)], 1)
    result = forward(model, "turbo", more, [10] * 3, filled)
    for i, source in enumerate(picked.tolist()):
        for now, before in zip(contents(filled, i), rows[source], strict=True):
            assert torch.equal(now[:, :32], before[:, :32])
        alone = TurboCache(model.config, SMALL)
        expected = forward(model, "turbo", more[i : i + 1], [40, 10, 10, 10], alone)[:, 40:]
        torch.testing.assert_close(result[i : i + 1], expected, rtol=1e-6, atol=1e-6)


def test_rows_take_their_padding_along(model, forward, tokens, padded):
    rows = [tokens(1, 30), tokens(1, 21, seed=1)]
    ids, mask = padded(rows)
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", ids[:, :24], [24], cache, mask[:, :24])
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    swapped, swapped_mask = ids[[1, 0, 1]], mask[[1, 0, 1]]
    result = forward(model, "turbo", swapped, [6], cache, swapped_mask)
    assert cache.seq_lens.tolist() == [21, 30, 21]
    cache.crop(-26)
    assert (cache.get_seq_length(), cache.seq_lens.tolist()) == (4, [0, 4, 0])
    again = forward(model, "turbo", swapped, [20, 6], cache, swapped_mask)[:, 20:]
    assert cache.seq_lens.tolist() == [21, 30, 21]
    alone = forward(model, "turbo", rows[1], [15, 6], TurboCache(model.config, SMALL))[:, 15:]
    for row in (0, 2):
        torch.testing.assert_close(result[row], alone[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again[row], alone[0], rtol=1e-6, atol=1e-6)


def test_repeat_and_select(filled):
    rows = [contents(filled, i) for i in range(3)]
    filled.batch_repeat_interleave(2)
    assert filled.batch_size == 6
    filled.batch_select_indices(torch.tensor([False, False, True, False, False, True]))
    assert filled.batch_size == 2
    for now, before in zip((contents(filled, 0), contents(filled, 1)), rows[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


@pytest.mark.parametrize("duplicate", [TurboCache.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_copies_are_independent(duplicate, model, filled, forward, tokens):
    ids = torch.cat([tokens(3, 40), tokens(3, 30, seed=1)], 1)
    other = duplicate(filled)
    expected = forward(model, "turbo", ids, [30], other)
    assert (filled.get_seq_length(), other.get_seq_length()) == (40, 70)
    assert torch.equal(forward(model, "turbo", ids, [30], filled), expected)


def test_reset_makes_room_for_another_batch(model, filled, forward, tokens):
    filled.reset()
    assert (filled.get_seq_length(), filled.batch_size) == (0, -1)
    ids = tokens(1, 9)
    result = forward(model, "turbo", ids, [9], filled)
    assert torch.equal(result, forward(model, "turbo", ids, [9], TurboCache(model.config, SMALL)))


def test_head_bits_and_means_per_layer(model, forward, tokens):
    bits = [[8, 4], [[3, 2], [8, 8]], None]
    cache = TurboCache(model.config, SMALL, head_bits=bits, k_mean=torch.zeros(3, 2, 64), max_tokens=64)
    forward(model, "turbo", tokens(1, 40), [40], cache)
    widths = [layer.kv.head_bits.tolist() for layer in cache.layers]
    assert widths == [[[8, 4], [8, 4]], [[3, 2], [8, 8]], [[4, 4], [4, 4]]]
    for name in ("head_bits", "k_mean"):
        with pytest.raises(ConfigError, match=f"{name}: expected one entry per layer .3., got 2"):
            TurboCache(model.config, **{name: [None, None]})


def test_caches_carry_their_layers_name_for_warnings(filled):
    assert [layer.kv.label for layer in filled.layers] == ["layer 0", "layer 1", "layer 2"]


def test_a_custom_matrix_hides_stored_tokens_from_some_queries(exact_core, model, forward, tokens):
    """A four-dimensional mask is honoured query by query, past tokens included."""
    ids = tokens(2, 30)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[20:, 3:9] = False
    mask = mask[None, None].expand(2, 1, -1, -1)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=additive).logits
        model.set_attn_implementation("turbo")
        for own in (mask, additive):
            torch.testing.assert_close(model(input_ids=ids, attention_mask=own).logits, expected, rtol=1e-5, atol=1e-5)
            cache = TurboCache(model.config)
            parts = [
                model(
                    input_ids=ids[:, a:b],
                    attention_mask=own[:, :, a:b, :b],
                    position_ids=torch.arange(a, b)[None],
                    past_key_values=cache,
                ).logits
                for a, b in ((0, 15), (15, 29), (29, 30))
            ]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_custom_matrix_with_padding(exact_core, model, forward, tokens, padded):
    rows = [tokens(1, 30), tokens(1, 17, seed=1)]
    ids, valid = padded(rows)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = (causal & valid[:, None, :].bool())[:, None]
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config)
    with torch.no_grad():
        parts = [
            model(
                input_ids=ids[:, a:b],
                attention_mask=mask[:, :, a:b, :b],
                position_ids=positions[:, a:b],
                past_key_values=cache,
            ).logits
            for a, b in ((0, 20), (20, 29), (29, 30))
        ]
    assert cache.seq_lens.tolist() == [30, 17]
    result = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        expected = forward(model, "eager", row)
        torch.testing.assert_close(result[i : i + 1, -row.shape[1] :], expected, rtol=1e-6, atol=1e-6)
