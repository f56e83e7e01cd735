"""Padding never enters a cache: rows of a padded batch equal those of separate runs."""

from __future__ import annotations

import pytest
import torch

from turboattention import TurboConfig
from turboattention.errors import InputError
from turboattention.integrations.transformers import TurboCache

SMALL = TurboConfig(bits=4, block_size=16, sink_tokens=16, guard="off")


@pytest.fixture(params=["llama", "mistral"])
def model(request, tiny):
    return tiny(request.param, dtype="float64")


def test_a_row_of_a_padded_batch_equals_the_row_alone(model, forward, tokens, padded):
    rows = [tokens(1, 70), tokens(1, 41, seed=1), tokens(1, 3, seed=2)]
    ids, mask = padded(rows)
    cache = TurboCache(model.config, SMALL)
    result = forward(model, "turbo", ids, [64, 1, 1, 1, 1, 1, 1], cache, mask)
    assert cache.seq_lens.tolist() == [70, 41, 3]
    for i, row in enumerate(rows):
        length = row.shape[1]
        solo = TurboCache(model.config, SMALL)
        # The same pieces: what the first piece of the batch holds of this row, then single tokens.
        alone = forward(model, "turbo", row, [length - 6, *[1] * 6] if length > 6 else [1] * length, solo)
        torch.testing.assert_close(result[i : i + 1, -length:], alone, rtol=1e-6, atol=1e-6)
        for layer, own in zip(cache.layers, solo.layers, strict=True):
            for batched, single in zip(layer.kv.dequantize(), own.kv.dequantize(), strict=True):
                torch.testing.assert_close(batched[i, :, :length], single[0], rtol=1e-6, atol=1e-6)


def test_what_padding_holds_does_not_matter(model, forward, tokens, padded):
    ids, mask = padded([tokens(1, 40), tokens(1, 25, seed=1)])
    results = []
    for filler in (0, 50):
        ids[mask == 0] = filler
        cache = TurboCache(model.config, SMALL)
        results.append(forward(model, "turbo", ids, [30, 10], cache, mask)[1, -25:])
    assert torch.equal(*results)


def test_holes_in_the_mask(tiny, forward, tokens):
    """A second turn of a batch is padded in the middle; positions count only tokens."""
    model = tiny("llama", dtype="float64")
    rows = [tokens(1, 30), tokens(1, 22, seed=1)]
    ids, mask = tokens(2, 30, seed=2), torch.ones(2, 30, dtype=torch.int64)
    ids[0], mask[1, :4], mask[1, 15:19] = rows[0][0], 0, 0
    ids[1, mask[1] == 1] = rows[1][0]
    cache = TurboCache(model.config, SMALL)
    result = forward(model, "turbo", ids, [12, 18], cache, mask)
    alone = forward(model, "turbo", rows[1], [8, 14], TurboCache(model.config, SMALL))
    torch.testing.assert_close(result[1, mask[1] == 1], alone[0], rtol=1e-6, atol=1e-6)
    assert cache.seq_lens.tolist() == [30, 22]
    cache.crop(-12)
    assert (cache.get_seq_length(), cache.seq_lens.tolist()) == (18, [18, 11])
    again = forward(model, "turbo", ids, [12], cache, mask)
    shorter = TurboCache(model.config, SMALL)
    expected = forward(model, "turbo", rows[1], [8, 3, 11], shorter)[:, 11:]
    torch.testing.assert_close(again[1, mask[1, 18:] == 1], expected[0], rtol=0.05, atol=0.05)


def test_a_chunk_of_nothing_but_padding(model, forward, tokens):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[:, :10] = 0
    cache = TurboCache(model.config, SMALL)
    result = forward(model, "turbo", ids, [8, 22], cache, mask)
    alone = forward(model, "turbo", ids[:, 10:], [20], TurboCache(model.config, SMALL))
    torch.testing.assert_close(result[:, 10:], alone, rtol=1e-6, atol=1e-6)


class TestMasksThatContradictTheCache:
    @pytest.fixture
    def cache(self, model, forward, tokens, padded):
        ids, mask = padded([tokens(1, 20), tokens(1, 12, seed=1)])
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", ids, [20], cache, mask)
        return cache

    def call(self, model, cache, mask):
        with torch.no_grad():
            model(input_ids=torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache)

    def test_hiding_stored_tokens(self, model, cache):
        mask = torch.ones(2, 21, dtype=torch.int64)
        mask[1, :10] = 0
        with pytest.raises(InputError, match=r"hides tokens that were stored, in row 1, 2 of 20 positions"):
            self.call(model, cache, mask)

    def test_showing_padding(self, model, cache):
        with pytest.raises(InputError, match=r"shows padding, which was not stored, in row 1, 8 of 20 positions"):
            self.call(model, cache, torch.ones(2, 21, dtype=torch.int64))

    def test_no_mask_on_a_padded_cache(self, model, cache):
        with pytest.raises(InputError, match="shows padding"):
            self.call(model, cache, None)

    def test_a_mask_of_the_new_tokens_alone(self, model, cache):
        with pytest.raises(InputError, match=r"one column for each of the 21 past and new positions, got 1"):
            self.call(model, cache, torch.ones(2, 1, dtype=torch.int64))

    def test_the_cache_is_as_before(self, model, cache, forward, tokens):
        with pytest.raises(InputError, match="shows padding"):
            self.call(model, cache, None)
        assert cache.seq_lens.tolist() == [20, 12]
        mask = torch.ones(2, 21, dtype=torch.int64)
        mask[1, :8] = 0
        cache.crop(cache.get_seq_length(len(cache.layers) - 1))
        self.call(model, cache, mask)
        assert cache.seq_lens.tolist() == [21, 13]
