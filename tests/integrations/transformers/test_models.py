"""Every supported shape of model, with and without a `TurboCache`, in one go, in pieces and padded.

Where the core is replaced by an exact stand-in, "turbo" must equal eager attention to rounding; with
the core itself, to what INT8 leaves.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from turboattention import TurboConfig
from turboattention.integrations.transformers import TurboCache, disable, enable

# Small blocks, so that short texts fill several, and windows of 24 release some.
CLOSE = TurboConfig(bits=8, block_size=16, sink_tokens=16, softmax="exp", guard="off")
LENGTH, PIECES = 90, [60, 1, 1, 20, 1, 7]
MODELS = "llama qwen3 phi3 mistral gemma2 gemma3 gpt_oss gpt2 gpt_neox olmo3 opt llama4 gemma3n mimo_v2_flash".split()
CACHES = {
    "turbo": lambda model: TurboCache(model.config, CLOSE),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=LENGTH + 11),
}


@pytest.fixture(params=MODELS)
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture(params=CACHES)
def cache(request, model):
    return CACHES[request.param](model)


def test_equals_eager_in_pieces(exact_core, model, cache, forward, tokens):
    ids = tokens(2, LENGTH)
    expected = forward(model, "eager", ids)
    result = forward(model, "turbo", ids, PIECES, cache)
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-4)


def test_equals_eager_without_a_cache(exact_core, model, forward, tokens):
    ids = tokens(2, LENGTH)
    torch.testing.assert_close(forward(model, "turbo", ids), forward(model, "eager", ids), rtol=2e-4, atol=2e-4)


def test_a_padded_batch_equals_its_rows_alone(exact_core, model, cache, forward, tokens, padded):
    rows = [tokens(1, 70), tokens(1, 41, seed=1), tokens(1, 18, seed=2)]
    ids, mask = padded(rows)
    result = forward(model, "turbo", ids, [50, 1, 19], cache, mask)
    for i, row in enumerate(rows):
        alone = forward(model, "eager", row)
        torch.testing.assert_close(result[i : i + 1, -row.shape[1] :], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["turbo", "dynamic"])
def test_int8_stays_close_to_eager(kind, model, forward, tokens, distance):
    # Top-1 routing among experts can flip at a near tie, which no attention can help.
    bound = 0.1 if "experts" in str(model.config) else 0.05
    ids = tokens(2, LENGTH)
    expected = forward(model, "eager", ids)
    result = forward(model, "turbo", ids, PIECES, CACHES[kind](model))
    assert distance(result, expected) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype, tiny, forward, tokens, distance):
    ids = tokens(1, 40)
    expected = forward(tiny("llama"), "eager", ids)
    half = tiny("llama", dtype=str(dtype).removeprefix("torch."))
    result = forward(half, "turbo", ids, [30, 10], TurboCache(half.config, CLOSE))
    assert result.dtype == dtype
    assert distance(result.float(), expected) < 0.1


@pytest.mark.parametrize("kind", ["turbo", "static"])
def test_compiled_models(kind, tiny, forward, tokens):
    """transformers compiles models over static caches on its own (on GPUs). A `TurboCache` ends the graph."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 20)
    expected = forward(model, "turbo", ids, [19, 1], CACHES[kind](model))
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, backend="eager"), CACHES[kind](model)
    with torch.no_grad():
        parts = [
            compiled(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 18), (18, 19), (19, 20))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@pytest.fixture
def integers():
    enable(TurboConfig(exact_rows=0))
    yield
    disable()
    enable()


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", None), ("llama", "static"), ("llama", "dynamic"), ("mistral", None), ("gpt_oss", None)]
)
def test_without_a_turbo_cache_models_compile_to_one_graph(name, kind, tiny, forward, tokens, padded, integers):
    """Without exact rows: a compiled model gives an explicit mask where an eager one says that it is causal."""
    model = tiny(name, num_hidden_layers=2, layer_types=None) if name == "gpt_oss" else tiny(name, num_hidden_layers=2)
    ids, mask = padded([tokens(1, 40), tokens(1, 31, seed=1)])
    sizes = [38, 1, 1] if kind else [40]
    caches = [CACHES[kind](model) if kind else None for _ in range(2)]
    expected = forward(model, "turbo", ids, sizes, caches[0], mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = forward(compiled, "turbo", ids, sizes, caches[1], mask)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("spare", [0, 11])
def test_masks_from_outside_a_compiled_graph(spare, tiny, forward, tokens):
    """As `generate` hands them over, where it compiles the steps over a static cache."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 20)
    expected = forward(model, "turbo", ids, [18, 1, 1], StaticCache(model.config, max_cache_len=20 + spare))
    torch._dynamo.reset()
    compiled, parts = torch.compile(model, backend="eager", fullgraph=True), []
    cache = StaticCache(model.config, max_cache_len=20 + spare)
    with torch.no_grad():
        for a, b in ((0, 18), (18, 19), (19, 20)):
            positions = torch.arange(a, b)[None]
            new = model.get_input_embeddings()(ids[:, a:b])
            mask = create_causal_mask(
                config=model.config,
                inputs_embeds=new,
                attention_mask=None,
                past_key_values=cache,
                position_ids=positions,
            )
            out = compiled(inputs_embeds=new, attention_mask=mask, position_ids=positions, past_key_values=cache)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
