"""A cache that holds one prompt, given another one."""

from __future__ import annotations

import copy

import pytest
import torch

from turboattention import TurboConfig
from turboattention.errors import InputError
from turboattention.integrations import transformers as integration
from turboattention.integrations.transformers import TurboCache

SMALL = TurboConfig(block_size=16, sink_tokens=16, guard="off")


def say(model, ids, cache, **options):
    model.set_attn_implementation("turbo")
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, **options)


@pytest.mark.parametrize("make", [lambda x: x, TurboCache.clone, copy.copy, copy.deepcopy])
def test_another_longer_prompt_is_refused(make, tiny, tokens):
    model, cache = tiny("llama"), None
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(2, 20), cache)
    cache = make(cache)
    before = cache.get_seq_length()
    with pytest.raises(InputError, match=r"the 24 tokens of the TurboCache, .* from token 0 on; reset"):
        say(model, tokens(2, 40, seed=1), cache)
    changed = torch.cat([said, tokens(2, 5, seed=2)], 1)
    changed[1, 22] = 95 if changed[1, 22] != 95 else 94  # generated, not of the prompt
    with pytest.raises(InputError, match=r"differs from token 22 on; crop\(22\)"):
        say(model, changed, cache)
    assert cache.get_seq_length() == before
    cache.crop(22)
    got = say(model, changed, cache)
    assert torch.equal(got[:, :30], torch.cat([changed, got[:, 29:30]], 1)[:, :30])


def test_a_prompt_that_goes_on_is_taken(tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(2, 20), cache)
    longer = torch.cat([said, tokens(2, 7, seed=2)], 1)
    assert say(model, longer, cache).shape == (2, 37)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_other_ways_to_generate_go_on(options, tiny, tokens):
    model = tiny("llama")
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    cache = TurboCache(model.config, SMALL)
    say(model, tokens(rows, 20), cache, **options)
    cache.reset()
    say(model, tokens(rows, 30, seed=3), cache, **options)


def test_it_can_be_switched_off_and_plain_forwards_know_nothing(tiny, tokens, forward):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL, check_prompts=False)
    say(model, tokens(1, 20), cache)
    say(model, tokens(1, 40, seed=1), cache.clone())
    plain = TurboCache(model.config, SMALL)
    forward(model, "turbo", tokens(1, 20), [20], plain)
    say(model, tokens(1, 40, seed=1), plain)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_prompts_in_pieces(exact_core, masked, tiny, tokens):
    """`prefill_chunk_size`: the same tokens as at once, also on a second turn; and other prompts are refused."""
    model = tiny("gemma3")
    model.set_attn_implementation("turbo")

    def say_by(ids, cache, size):
        options = {"attention_mask": torch.ones_like(ids)} if masked else {}
        options |= {} if size is None else {"prefill_chunk_size": size}
        return model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, **options)

    whole, pieces = TurboCache(model.config, SMALL), TurboCache(model.config, SMALL)
    said = say_by(tokens(2, 40), whole, None)
    assert torch.equal(say_by(tokens(2, 40), pieces, 7), said)
    longer = torch.cat([said, tokens(2, 30, seed=2)], 1)
    assert torch.equal(say_by(longer, pieces, 16), say_by(longer, whole, None))
    assert torch.equal(pieces.known_ids, whole.known_ids)
    with pytest.raises(InputError, match="differs from token 0 on"):
        say_by(tokens(2, 99, seed=1), pieces, 16)
    with pytest.raises(InputError, match=r"continues the 79 tokens .* got 70"):
        say_by(longer[:, :70], pieces, 16)


def test_embeddings_say_nothing_and_forget_nothing(tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 20), cache)
    embeddings = model.get_input_embeddings()(torch.cat([said, tokens(1, 7, seed=2)], 1)).detach()
    model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 99, seed=1), cache)


def test_a_loaded_cache_is_followed(tiny, tokens, tmp_path):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 20), cache)
    cache.save(tmp_path / "cache", input_ids=said[:, : cache.get_seq_length()])
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 40, seed=1), TurboCache.load(tmp_path / "cache"))


def test_a_saved_cache_knows_what_generate_gave_it(tiny, tokens, tmp_path):
    """Also without `input_ids`, and in a second generation of files; not where other tokens came between."""
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 20), cache)
    for path in (tmp_path / "first", tmp_path / "second"):
        cache.save(path)
        cache = TurboCache.load(path)
        assert cache.prompt_ids is not None
        assert torch.equal(cache.prompt_ids, said[:, : cache.get_seq_length()])
        with pytest.raises(InputError, match="differs from token 0 on"):
            say(model, tokens(1, 40, seed=1), cache)
    with torch.no_grad():
        model(input_ids=tokens(1, 3), past_key_values=cache, use_cache=True)
    cache.save(tmp_path / "third")
    assert TurboCache.load(tmp_path / "third").prompt_ids is None


def test_disable_leaves_generate_as_it_was():
    from transformers import GenerationMixin

    integration.enable()
    integration.disable()
    for method in (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._prefill):
        assert not hasattr(method, "_turbo_original")


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("shorter", [0, 3])
def test_a_prompt_that_is_there_already_is_said_to_be_too_short(padding, shorter, tiny, tokens):
    """Also of a padded batch, where the mask was blamed."""
    model, ids = tiny("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config, SMALL)
    options = {"past_key_values": cache, "max_new_tokens": 5, "do_sample": False}
    model.generate(ids, attention_mask=mask, **options)
    ids, mask = ids[:, : 20 - shorter], mask[:, : 20 - shorter]
    with pytest.raises(
        InputError,
        match=rf"^input_ids: expected a prompt that continues the 24 tokens .* got {20 - shorter}; "
        rf"crop\({-5 - shorter}\) leaves one",
    ):
        model.generate(ids, attention_mask=mask, **options)
    cache.crop(-5 - shorter)
    assert model.generate(ids, attention_mask=mask, **options).shape == (2, 25 - shorter)
