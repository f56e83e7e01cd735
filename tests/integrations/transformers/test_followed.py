"""A cache that holds one prompt, given another one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

from turboattention import TurboConfig
from turboattention.errors import InputError, ShapeError
from turboattention.integrations import transformers as integration
from turboattention.integrations.transformers import TurboCache

SMALL = TurboConfig(block_size=16, sink_tokens=16, guard="off")
KEEPS_MASK = pytest.mark.skipif(
    "_mask_length" not in inspect.getsource(GenerationMixin.generate),
    reason="this transformers cuts the mask to the new ids",
)
"""Some ways to generate over a cache that holds tokens need it."""


def say(model, ids, cache, **options):
    model.set_attn_implementation("turbo")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False} | options
    return model.generate(ids, past_key_values=cache, **options)


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
    with pytest.warns(UserWarning, match=r"^input_ids: cannot be compared with 20 of the 20 tokens .* check_prompts=F"):
        say(model, tokens(1, 40, seed=1), plain)
    plain.check_prompts = False
    say(model, tokens(1, 60, seed=2), plain)


def test_tokens_of_plain_forwards_can_be_made_known(tiny, tokens, forward):
    model, ids = tiny("llama"), tokens(1, 60)
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", ids[:, :40], [20, 20], cache)
    with pytest.raises(InputError, match=r"^input_ids: expected the 40 tokens that the cache holds, got 39"):
        cache.prompt_ids = ids[:, :39]
    cache.prompt_ids = ids[:, :40]
    said = say(model, ids, cache)  # a warning would be an error
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 90, seed=1), cache)
    whole = torch.cat([said, ids], 1)
    forward(model, "turbo", whole[:, : cache.get_seq_length() + 3], [3], cache)
    cache.prompt_ids = whole[:, : cache.get_seq_length()]
    say(model, whole, cache)


def test_tokens_behind_those_that_are_known_are_warned_of_once(tiny, tokens, forward):
    model, ids = tiny("llama"), tokens(1, 90)
    cache = TurboCache(model.config, SMALL)
    said = say(model, ids[:, :20], cache)
    whole = torch.cat([said, ids[:, 25:]], 1)
    forward(model, "turbo", whole, [6], cache)
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 40, seed=1), cache)
    with pytest.warns(UserWarning, match="6 of the 30 tokens"):
        more = say(model, whole[:, :40], cache)
    forward(model, "turbo", torch.cat([more, whole], 1), [3], cache)
    say(model, torch.cat([more, whole[:, :30]], 1), cache)


def test_a_buffer_that_is_used_again(tiny, tokens, tmp_path):
    """The ids are a copy, independent of later changes of the caller's tensor."""
    model, buffer = tiny("llama"), torch.zeros(1, 100, dtype=torch.int64)
    first, second = tokens(1, 30), tokens(1, 60, seed=1)
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config, SMALL)
    buffer[:, :30] = first
    options = {"past_key_values": cache, "max_new_tokens": 1, "do_sample": False}
    model.generate(buffer[:, :30], **options)
    buffer[:, :60] = second
    with pytest.raises(InputError, match="differs from token 0 on"):
        model.generate(buffer[:, :60], **options)
    cache.known_ids.zero_()
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache")
    loaded.prompt_ids.zero_()
    assert torch.equal(loaded.prompt_ids, first)
    loaded.prompt_ids = second[:, :30]
    second.zero_()
    assert loaded.prompt_ids.any()
    model.generate(torch.cat([first, tokens(1, 5, seed=2)], 1), **options)


@pytest.mark.parametrize("checked", [True, False])
def test_only_new_ids_under_a_mask_of_all(checked, exact_core, tiny, tokens):
    """As over a DynamicCache. The cache then knows all of them."""
    model, ids, more = tiny("llama"), tokens(2, 30), tokens(2, 9, seed=1)
    runs = []
    for name, cache in (("turbo", TurboCache(model.config, SMALL, check_prompts=checked)), ("eager", DynamicCache())):
        model.set_attn_implementation(name)
        options = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False}
        said = model.generate(ids, **options)
        mask = torch.ones(2, cache.get_seq_length() + 9, dtype=torch.int64)
        runs.append((said, model.generate(more, attention_mask=mask, **options)))
        if name == "turbo":
            assert torch.equal(cache.known_ids, torch.cat([said[:, :-1], runs[0][1]], 1)[:, : cache.get_seq_length()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@KEEPS_MASK
@pytest.mark.parametrize("checked", [True, False])
def test_assisted_decoding_takes_only_new_ids(checked, exact_core, tiny, tokens):
    """transformers then passes all ids to the model, including those in the cache."""
    model, ids, more = tiny("llama"), torch.cat([tokens(1, 10)] * 3, 1), torch.cat([tokens(1, 10)] * 2, 1)
    said = []
    for lookup in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = TurboCache(model.config, SMALL, check_prompts=checked)
        first = say(model, ids, cache)
        held, mask = cache.get_seq_length(), torch.ones(1, cache.get_seq_length() + 20, dtype=torch.int64)
        options = {"past_key_values": cache, "max_new_tokens": 12, "do_sample": False} | lookup
        if lookup and checked:
            whole = torch.cat([first[:, :held], more], 1)
            with pytest.raises(InputError, match=rf"expected only the ids after the {held} .* input_ids\[:, {held}:\]"):
                model.generate(whole, **options)
            with pytest.raises(InputError, match="new ids alone need an attention_mask of all positions"):
                model.generate(more, **options)
            cache.crop(held)
        said.append(model.generate(more, attention_mask=mask, **options))
        assert torch.equal(cache.known_ids, torch.cat([first[:, :held], said[-1]], 1)[:, : cache.get_seq_length()])
    assert torch.equal(*said)


@pytest.mark.parametrize("given", [60, 10])
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_decoding_refuses_a_prompt_before_it_is_stored(how, checked, given, tiny, tokens):
    model = tiny("llama")
    options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": model}
    cache = TurboCache(model.config, SMALL, check_prompts=checked)
    said = say(model, tokens(1, 38), cache)
    before = cache.nbytes
    with pytest.raises(InputError, match=r"^input_ids: expected only the ids after the 42 tokens"):
        say(model, tokens(1, given, seed=1), cache, **options)
    assert (cache.get_seq_length(), cache.nbytes) == (42, before)
    assert torch.equal(cache.known_ids, said[:, :42])
    say(model, torch.cat([said, tokens(1, 5)], 1), cache)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_a_mask_of_other_positions_is_refused_before_anything_is_stored(options, tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 38), cache)
    options |= {"past_key_values": cache, "max_new_tokens": 5, "do_sample": False}
    for positions in (47, 60):
        mask = torch.ones(1, positions, dtype=torch.int64)
        with pytest.raises(InputError, match=rf"^attention_mask: expected 52 positions .* got {positions}$"):
            model.generate(tokens(1, 10, seed=1), attention_mask=mask, **options)
        assert torch.equal(cache.known_ids, said[:, :42])


def test_an_error_in_generate_leaves_the_ids_of_what_is_stored(tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 38), cache)
    with pytest.raises(ShapeError, match="batch_repeat_interleave"):
        say(model, torch.cat([said, tokens(1, 5)], 1), cache, num_beams=3)
    assert torch.equal(cache.known_ids, said[:, :42])

    def fail(*_):
        if cache.get_seq_length() == 45:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            say(model, torch.cat([said, tokens(1, 1)], 1), cache)
    finally:
        handle.remove()
    assert torch.equal(cache.known_ids[:, :44], torch.cat([said, tokens(1, 1)], 1))
    with torch.no_grad():
        model(input_ids=tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 46
    assert cache.known_ids is None


@pytest.mark.filterwarnings("ignore:input(_ids|s_embeds). cannot be compared:UserWarning")
@pytest.mark.parametrize("embedded", [False, True], ids=["called", "embedded"])
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"prefill_chunk_size": 16}, marks=KEEPS_MASK), {"num_beams": 3}, {"do_sample": True}],
    ids=str,
)
def test_a_prompt_does_not_make_unknown_tokens_known(options, embedded, tiny, tokens, forward, tmp_path):
    """The new ones are, and are compared."""
    model, wrong = tiny("llama"), tokens(1, 60, seed=1)
    cache = TurboCache(model.config, SMALL)
    known = 0
    if embedded:  # behind tokens that are known
        wrong[:, :24], known = say(model, tokens(1, 20), cache)[:, :24], 24
        embeddings = model.get_input_embeddings()(tokens(1, 39)).detach()
        model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5, do_sample=False)
    else:
        forward(model, "turbo", tokens(1, 43), [43], cache)
    assert cache.get_seq_length() == 43
    cache.batch_repeat_interleave(options.get("num_beams", 1))
    said = say(model, wrong, cache, **{"do_sample": False} | options)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 64
    assert cache.known_ids is None
    for ids, place in ((said, 43), (said, 59), (tokens(1, 90, seed=2), 0))[: 3 if known else 2]:
        other = torch.cat([ids, wrong], 1)
        other[:, place] = said[:, place] ^ 1
        with pytest.raises(InputError, match=f"differs from token {place} on"):
            say(model, other, cache)
    cache.crop(40)
    assert cache.known_ids is None
    cache.save(tmp_path / "cache")
    assert TurboCache.load(tmp_path / "cache").prompt_ids is None


def test_new_ids_behind_unknown_tokens_are_known(tiny, tokens, forward):
    model, ids = tiny("llama"), tokens(1, 90)
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", ids, [20], cache)
    mask = torch.ones(1, 29, dtype=torch.int64)
    model.generate(ids[:, 20:29], attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    assert cache.known_ids is None
    other = ids.clone()
    other[:, 20] ^= 1
    with pytest.raises(InputError, match="differs from token 20 on"):
        say(model, other, cache)
    cache.prompt_ids = ids[:, :29]
    assert torch.equal(cache.known_ids, ids[:, :29])


def test_a_prompt_that_is_not_compared_does_not_replace_known_ids(tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL, check_prompts=False)
    said = say(model, tokens(1, 38), cache)
    other = say(model, tokens(1, 60, seed=1), cache)
    assert torch.equal(cache.known_ids, torch.cat([said[:, :42], other[:, 42:64]], 1))


def test_models_that_prepare_inputs_themselves(tiny, tokens):
    model = copy.copy(tiny("llama"))

    class Own(type(model)):
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **_):
            new = input_ids[:, past_key_values.get_seq_length() :]
            return {"input_ids": new, "past_key_values": past_key_values, "attention_mask": attention_mask}

    model.__class__ = Own
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 20), cache)
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 40, seed=1), cache)
    with pytest.warns(UserWarning, match="4 of the 24 tokens"):
        say(model, torch.cat([said, tokens(1, 5)], 1), cache)


@pytest.mark.parametrize("checked", [True, False])
def test_the_switch_is_kept_in_files(checked, tiny, tokens, tmp_path):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL, check_prompts=checked)
    say(model, tokens(1, 20), cache)
    cache.save(tmp_path / "cache")
    assert TurboCache.load(tmp_path / "cache").check_prompts is checked
    assert cache.clone().check_prompts is checked


@KEEPS_MASK
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


def test_embeddings_are_warned_of_and_forget_nothing(tiny, tokens):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    said = say(model, tokens(1, 20), cache)
    embeddings = model.get_input_embeddings()(torch.cat([said, tokens(1, 7, seed=2)], 1)).detach()
    with pytest.warns(UserWarning, match="^inputs_embeds: cannot be compared with the 24 tokens"):
        model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(InputError, match="differs from token 0 on"):
        say(model, tokens(1, 99, seed=1), cache)


def test_ids_behind_embeddings_are_warned_of(tiny, tokens):
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config, SMALL)
    embeddings = model.get_input_embeddings()(tokens(1, 20)).detach()
    model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.warns(UserWarning, match="^input_ids: cannot be compared with 24 of the 24 tokens"):
        say(model, tokens(1, 40), cache)


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
    for method in ("generate", "prepare_inputs_for_generation", "_prefill", "_assisted_decoding"):
        assert not hasattr(getattr(GenerationMixin, method), "_turbo_original")


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
