"""`model.generate` with a `TurboCache`: every way of decoding that transformers has."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from turboattention import TurboConfig
from turboattention.integrations.transformers import TurboCache

SMALL = TurboConfig(block_size=16, sink_tokens=16, guard="off", stored_prefill=True)
INT8 = TurboConfig(bits=8, block_size=16, sink_tokens=16, guard="off")
NEW = 12


@pytest.fixture(params=["llama", "mistral", "gemma3"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def generate(tokens, padded):
    """Sequences and logits; the prompt is a left-padded batch of `rows`."""

    def run(model, attention, cache, rows=3, **options):
        model.set_attn_implementation(attention)
        ids, mask = padded([tokens(1, n, seed=n) for n in (33, 20, 9)[:rows]])
        torch.manual_seed(0)
        settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **(settings | options))

    return run


@pytest.fixture
def assistant(tiny):
    """A draft model that is right often, but not always."""

    def make(model, attention="eager"):
        draft = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        for parameter in draft.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        draft.generation_config.num_assistant_tokens = 4
        draft.set_attn_implementation(attention)
        return draft

    return make


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"rows": 1, "prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_eager(exact_core, way, model, generate):
    expected = generate(model, "eager", None, **WAYS[way])
    result = generate(model, "turbo", TurboCache(model.config), **WAYS[way])
    assert torch.equal(result.sequences, expected.sequences)
    for step, wanted in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", "llama qwen3 phi3 mistral gemma2 gemma3 gpt_oss gpt2 gpt_neox opt llama4 gemma3n".split()
)
def test_other_architectures_equal_eager(exact_core, name, tiny, generate):
    model = tiny(name)
    expected = generate(model, "eager", None, max_new_tokens=5)
    result = generate(model, "turbo", TurboCache(model.config), max_new_tokens=5)
    assert torch.equal(result.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("name", "draft"), [("llama", "eager"), ("llama", "turbo"), ("mistral", "turbo"), ("gemma3", "turbo")]
)
def test_assisted_decoding_equals_eager(exact_core, name, draft, tiny, generate, assistant):
    model = tiny(name)
    expected = generate(model, "eager", None, rows=1, max_new_tokens=30)
    options = {"rows": 1, "max_new_tokens": 30, "assistant_model": assistant(model, draft)}
    result = generate(model, "turbo", TurboCache(model.config), **options)
    assert torch.equal(result.sequences, expected.sequences)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_without_a_turbo_cache(exact_core, cache_implementation, model, generate):
    expected = generate(model, "eager", None)
    result = generate(model, "turbo", None, cache_implementation=cache_implementation)
    assert torch.equal(result.sequences, expected.sequences)


def test_greedy_equals_a_loop_of_forwards(tiny, forward, tokens):
    model, ids = tiny("llama", dtype="float64"), tokens(2, 40)
    cache = TurboCache(model.config, SMALL)
    expected = ids
    step = forward(model, "turbo", ids, [40], cache)[:, -1:]
    for _ in range(20):
        expected = torch.cat([expected, step.argmax(-1)], 1)
        step = forward(model, "turbo", expected, [1], cache)
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=TurboCache(model.config, SMALL),
        max_new_tokens=20,
        do_sample=False,
    )
    assert torch.equal(result, expected)


@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_speculation_takes_what_greedy_would(way, tiny, generate, forward, assistant):
    """Several tokens at once round differently from one at a time, so that near ties may fall either
    way; but every token is the likeliest one, or as good as that."""
    config = TurboConfig(block_size=16, sink_tokens=16, guard="off", flush_lag=16)
    model = tiny("llama")
    options = {"assistant_model": assistant(model)} if way == "assistant" else {"prompt_lookup_num_tokens": 4}
    cache = TurboCache(model.config, config)
    result = generate(model, "turbo", cache, rows=1, max_new_tokens=40, **options).sequences
    # Prompt and new tokens, the last of which no forward needs to have seen.
    assert cache.get_seq_length() in (33 + 39, 33 + 40)
    logits = forward(model, "turbo", result, [33] + [1] * 40, TurboCache(model.config, config))[:, 32:-1]
    behind = logits.amax(-1) - logits.gather(2, result[:, 33:, None])[..., 0]
    assert float(behind.max()) < 0.05 * float(logits.std())


def test_beams_score_what_their_tokens_score_alone(tiny, forward, tokens):
    """Reordering does not mix beams: each returned beam, fed separately, has its reported score."""
    model, ids = tiny("mistral", dtype="float64"), tokens(2, 33)
    model.set_attn_implementation("turbo")
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=TurboCache(model.config, INT8),
        max_new_tokens=20,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        length_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logits = forward(model, "turbo", result.sequences, [33] + [1] * 20, TurboCache(model.config, INT8))
    chosen = result.sequences[:, 33:, None]
    scores = logits[:, 32:-1].log_softmax(-1).gather(2, chosen)[..., 0].mean(1)
    torch.testing.assert_close(scores.float(), result.sequences_scores, rtol=1e-4, atol=1e-4)


def test_chunks_do_not_matter_with_stored_prefill(tiny, generate):
    model = tiny("llama", dtype="float64")
    whole = generate(model, "turbo", TurboCache(model.config, SMALL))
    chunked = generate(model, "turbo", TurboCache(model.config, SMALL), prefill_chunk_size=5)
    assert torch.equal(whole.sequences, chunked.sequences)
    for step, wanted in zip(chunked.logits, whole.logits, strict=True):
        torch.testing.assert_close(step, wanted, rtol=1e-4, atol=1e-4)


def test_sampling_is_repeatable(tiny, generate):
    model = tiny("llama")
    runs = [
        generate(model, "turbo", TurboCache(model.config, SMALL), do_sample=True, num_return_sequences=2).sequences
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert runs[0].shape[0] == 6


def test_a_cache_serves_a_second_turn(exact_core, tiny, generate, tokens):
    model = tiny("gemma3")
    model.set_attn_implementation("turbo")
    ids = tokens(2, 30)
    cache = TurboCache(model.config)
    settings = {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    longer = torch.cat([first, tokens(2, 9, seed=1)], 1)
    second = model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **settings)
    model.set_attn_implementation("eager")
    assert torch.equal(second, model.generate(longer, attention_mask=torch.ones_like(longer), **settings))


def test_cache_implementation_and_a_turbo_cache_conflict(tiny, generate):
    model = tiny("llama")
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, "turbo", TurboCache(model.config), cache_implementation="static")


def test_this_release_crops_by_what_to_remove():
    """The contract `TurboLayer.crop` builds on, in every release that is supported."""
    from transformers import DynamicCache

    assert "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters
