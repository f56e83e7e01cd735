"""Models with layers without attention: our layers combined with transformers' own."""

from __future__ import annotations

import copy
import json
from functools import cache as remembered

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from turboattention import TurboConfig
from turboattention.errors import ConfigError, FormatError, InputError, NonFiniteError, UnsupportedError
from turboattention.integrations.transformers import GraphedDecoding, TurboCache, calibrate

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONFIGS = {
    # Linear attention and attention, one with a gate.
    "qwen3_next": {
        **LINEAR,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_experts": 4,
    },
    "qwen3_5_text": LINEAR,
    # A convolution each for queries, keys and values.
    "olmo_hybrid": LINEAR,
    # Both in every layer.
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 128, **MAMBA},
    # Convolutions and a state of the router in every layer, some with a window.
    "zaya": {
        "num_hidden_layers": 2,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 24,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "router_hidden_size": 16,
    },
    # State-space layers, attention, and layers with neither.
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "num_hidden_layers": 5,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    # Convolutions, which go back, and attention.
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
    },
    # Sliding windows, too.
    "lfm3": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv"],
        "sliding_window": 24,
    },
    # Lightning attention, in a cache of the model's own class.
    "minimax": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "block_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # Mamba alone, and with attention.
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "attention_head_dim": 32,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
    },
}
CONFIGS = {name: sizes for name, sizes in CONFIGS.items() if name in CONFIG_MAPPING}  # older releases have fewer
CONVOLUTIONS = [name for name in CONFIGS if name.startswith("lfm")]
RECURRENT = [name for name in CONFIGS if name not in CONVOLUTIONS]
LENGTH, PIECES = 50, [30, 1, 1, 17, 1]
QUANTIZED = TurboConfig(bits=8, block_size=16, sink_tokens=16, softmax="exp", guard="off")


@remembered
def _built(name: str):
    config = AutoConfig.for_model(name, **{**COMMON, **CONFIGS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def hybrid():
    return _built


@pytest.fixture(params=CONFIGS)
def model(request, hybrid):
    return hybrid(request.param)


def own_cache(config):
    """transformers' cache for a model."""
    return MiniMaxCache() if config.model_type == "minimax" else DynamicCache(config=config)


def generated(model, attention, ids, mask, **settings):
    """Ids of a prompt and of 8 new tokens."""
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    options = {"past_key_values": (TurboCache if attention == "turbo" else own_cache)(model.config)}
    if model.config.model_type == "minimax" and attention == "eager" and "num_beams" in settings:
        options = {"use_cache": False}  # a MiniMaxCache does not reorder its states
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **settings)


def assistant(model):
    """A model that drafts some tokens right and some wrong."""
    drafting = copy.deepcopy(model)
    drafting.set_attn_implementation("eager")
    drafting.lm_head.weight.data += 0.02 * torch.randn_like(drafting.lm_head.weight)
    return drafting


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)


def test_equals_eager_with_the_models_own_cache(exact_core, model, forward, tokens):
    ids, own, cache = tokens(2, LENGTH), own_cache(model.config), TurboCache(model.config)
    expected = forward(model, "eager", ids, PIECES, own)
    close(forward(model, "turbo", ids, PIECES, cache), expected)
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        for name in ("conv_states", "|recurrent_states"):
            for number, x in getattr(theirs, name, {}).items():
                if x is not None:
                    torch.testing.assert_close(getattr(mine, name)[number], x, rtol=1e-3, atol=1e-3)


def test_padding(exact_core, model, forward, tokens, padded):
    ids, mask = padded([tokens(1, LENGTH), tokens(1, 37, seed=1)])
    expected = forward(model, "eager", ids, PIECES, own_cache(model.config), mask)
    result = forward(model, "turbo", ids, PIECES, TurboCache(model.config), mask)
    close(result[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampled"],
)
def test_generate(exact_core, model, settings, tokens, padded):
    ids, mask = padded([tokens(1, 20), tokens(1, 13, seed=1)])
    expected = generated(model, "eager", ids, mask, **settings)
    assert torch.equal(generated(model, "turbo", ids, mask, **settings), expected)


def test_a_prompt_in_chunks(exact_core, model, tokens, padded):
    ids, mask = padded([tokens(1, 20), tokens(1, 13, seed=1)])
    settings = {"do_sample": False, "prefill_chunk_size": 8}
    expected = generated(model, "eager", ids, mask, **settings)
    assert torch.equal(generated(model, "turbo", ids, mask, **settings), expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("drafts", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_where_the_model_can_go_back(exact_core, name, drafts, hybrid, tokens):
    model, ids = hybrid(name), torch.cat([tokens(1, 8)] * 3, 1)
    settings = {"do_sample": False, drafts: 4 if drafts == "prompt_lookup_num_tokens" else assistant(model)}
    expected = generated(model, "eager", ids, torch.ones_like(ids), do_sample=False)
    assert torch.equal(generated(model, "turbo", ids, torch.ones_like(ids), **settings), expected)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("drafts", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_are_refused_where_it_cannot(name, drafts, hybrid, tokens):
    """By transformers, or before the first forward pass, whether or not a draft would be rejected."""
    model, ids = hybrid(name), torch.cat([tokens(1, 8)] * 3, 1)
    model.set_attn_implementation("turbo")
    cache = TurboCache(model.config)
    settings = {drafts: 4 if drafts == "prompt_lookup_num_tokens" else hybrid("lfm2_moe")}
    refused = rf"^assisted generation is not supported with stateful models, such as {type(model).__name__}"
    if not model._is_stateful:
        refused = r"^prompt_lookup_num_tokens, assistant_model: expected .* a recurrent state in layer \d \(linear_"
    with pytest.raises((ValueError, UnsupportedError), match=refused):
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **settings)
    assert cache.get_seq_length() == 0


def test_quantized_attention_stays_close(model, forward, tokens, distance):
    ids = tokens(2, LENGTH)
    expected = forward(model, "eager", ids, PIECES, own_cache(model.config))
    cache = TurboCache(model.config, QUANTIZED)
    assert distance(forward(model, "turbo", ids, PIECES, cache), expected) < 0.1
    assert cache.nbytes == sum(layer.kv.nbytes for layer in cache.attention_layers)
    states = [
        x
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for x in getattr(layer, name, {}).values()
        if x is not None
    ]
    assert cache.state_nbytes == sum(x.nbytes for x in states) > 0


def test_exact_layers(model, forward, tokens):
    ids, attending = tokens(1, LENGTH), [layer.index for layer in TurboCache(model.config).attention_layers]
    expected = forward(model, "eager", ids, PIECES, own_cache(model.config))
    cache = TurboCache(model.config, QUANTIZED, exact_layers=attending)
    close(forward(model, "turbo", ids, PIECES, cache), expected)
    assert cache.exact_layers == tuple(attending)


def test_exact_layers_that_do_not_attend(hybrid):
    with pytest.raises(ConfigError, match=r"expected indices of layers that attend, \[3\], got \[0\]"):
        TurboCache(hybrid("qwen3_next").config, exact_layers=[0])


# -- what caches do ----------------------------------------------------------------------------------


def test_copies_are_independent(model, forward, tokens):
    ids, cache = tokens(2, LENGTH), TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", ids, [30], cache)
    other = copy.deepcopy(cache)
    expected = forward(model, "turbo", ids, [20], cache)
    assert torch.equal(forward(model, "turbo", ids, [20], other), expected)


def test_reorder_repeat_and_select(model, forward, tokens):
    ids, cache, alone = tokens(2, LENGTH), TurboCache(model.config, QUANTIZED), TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", ids, [30], cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    order = [1, 1, 0]
    forward(model, "turbo", ids[order], [30], alone)
    close(forward(model, "turbo", ids[order], [20], cache), forward(model, "turbo", ids[order], [20], alone))


def test_a_saved_cache_goes_on(model, forward, tokens, padded, tmp_path):
    ids, mask = padded([tokens(1, LENGTH), tokens(1, 37, seed=1)])
    cache = TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", ids, [40], cache, mask)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache", model.config)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    assert (loaded.nbytes, loaded.state_nbytes) == (cache.nbytes, cache.state_nbytes)
    expected = forward(model, "turbo", ids, [9, 1], cache, mask)
    assert torch.equal(forward(model, "turbo", ids, [9, 1], loaded, mask), expected)


def test_damaged_states(hybrid, forward, tokens, tmp_path):
    model, path = hybrid("qwen3_next"), tmp_path / "cache"
    cache = TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", tokens(1, 20), [20], cache)
    cache.save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, change in (
        ("layer0.conv_states0", lambda x: x[..., 1:]),
        ("layer0.conv_states0", lambda x: x[:0]),
        ("layer0.recurrent_states0", lambda x: x * torch.nan),
        ("layer0.recurrent_states0", lambda x: x.int()),
        ("layer0.recurrent_states0", None),
    ):
        damaged = {key: x for key, x in tensors.items() if key != name or change is not None}
        if change is not None:
            damaged[name] = change(tensors[name]).contiguous()
        save_file(damaged, path, metadata)
        with pytest.raises((FormatError, NonFiniteError)):
            TurboCache.load(path)
    assert json.loads(json.dumps(metadata)) == metadata


def test_reset_takes_another_batch(model, forward, tokens):
    ids, cache, fresh = tokens(3, LENGTH), TurboCache(model.config, QUANTIZED), TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", tokens(1, 30), [30], cache)
    cache.reset()
    assert torch.equal(forward(model, "turbo", ids, [30], cache), forward(model, "turbo", ids, [30], fresh))


# -- what cannot go back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_a_crop_of_recurrent_states_is_refused_and_changes_nothing(name, hybrid, forward, tokens):
    model, ids, cache = hybrid(name), tokens(1, LENGTH), TurboCache(hybrid(name).config, QUANTIZED)
    forward(model, "turbo", ids, [30], cache)
    other = cache.clone()
    for cut in (-1, -29, 12):
        with pytest.raises(UnsupportedError, match=r"crop: layer \d has a recurrent state, which cannot go back"):
            cache.crop(cut)
    cache.crop(0)
    cache.crop(30)
    assert not getattr(cache, "is_croppable", False)  # what newer releases ask before assisted decoding
    assert {layer.get_seq_length() for layer in cache.attention_layers} == {30}
    expected = forward(model, "turbo", ids, [20], other)
    assert torch.equal(forward(model, "turbo", ids, [20], cache), expected)
    cache.crop(-LENGTH)  # to nothing
    assert cache.state_nbytes == 0
    forward(model, "turbo", ids, [30], cache)


def test_convolutions_go_back_as_far_as_recorded(hybrid, forward, tokens):
    model, ids, cache = hybrid("lfm2_moe"), tokens(1, LENGTH), TurboCache(hybrid("lfm2_moe").config, QUANTIZED)
    forward(model, "turbo", ids, [30], cache)
    with pytest.raises(UnsupportedError, match=r"crop: layer 0 keeps the last \d inputs of a convolution"):
        cache.crop(-2)
    other = cache.clone()
    cache.activate_past_recording()
    forward(model, "turbo", ids.flip(1), [6], cache)
    with pytest.raises(UnsupportedError, match="inputs of a convolution"):
        cache.crop(-20)
    assert cache.get_seq_length() == 36
    cache.crop(-6)
    states = [x for _, layer in cache.state_layers for x in layer.conv_states.values()]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in states), "what was recorded is let go of"
    close(forward(model, "turbo", ids, [20], cache), forward(model, "turbo", ids, [20], other))


def test_states_that_ran_ahead_are_noticed(hybrid, forward, tokens):
    """A forward that breaks off in the first attention layer has moved the states in front of it."""
    model, cache = copy.deepcopy(hybrid("qwen3_next")), TurboCache(hybrid("qwen3_next").config, QUANTIZED)
    forward(model, "turbo", tokens(1, LENGTH), [30], cache)
    weight = model.model.layers[3].self_attn.k_proj.weight
    before = weight.data.clone()
    weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError):
        forward(model, "turbo", tokens(1, LENGTH), [5], cache)
    weight.data.copy_(before)
    with pytest.raises(InputError, match=r"layer 0, got some that are ahead.*reset\(\) empties"):
        forward(model, "turbo", tokens(1, LENGTH), [5], cache)
    cache.reset()
    forward(model, "turbo", tokens(1, LENGTH), [30, 5], cache)


@pytest.mark.parametrize("failing", [1, 3])
def test_a_crop_after_a_failed_forward_is_refused_where_states_are_ahead(failing, hybrid, forward, tokens):
    """Convolutions before the failed layer have advanced, those after it have not."""
    model, ids = copy.deepcopy(hybrid("lfm2_moe")), tokens(1, LENGTH)
    cache = TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", ids, [30], cache)
    cache.activate_past_recording()
    forward(model, "turbo", ids, [4], cache)
    model.model.layers[failing].self_attn.k_proj.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError):
        forward(model, "turbo", ids, [5], cache)
    with pytest.raises(InputError, match=r"an earlier forward failed halfway. reset\(\) empties"):
        cache.crop(32)


def test_what_is_not_supported(hybrid, tokens):
    model = hybrid("qwen3_next")
    with pytest.raises(UnsupportedError, match="whose layer 0 has a LinearAttentionLayer"):
        calibrate(model, tokens(1, 300)[0].tolist(), length=300)
    model.set_attn_implementation("turbo")
    with pytest.raises(
        (UnsupportedError, InputError), match="layers other than attention are not supported in a graph"
    ):
        GraphedDecoding(model, TurboCache(model.config, max_tokens=64), capture=False)
    for kind, said in (("mamba", "without"), ("rwkv", "does not take"), ("recurrent_gemma", "in its modules")):
        with pytest.raises(UnsupportedError, match=said):
            TurboCache(AutoConfig.for_model(kind))


def test_a_crop_that_a_sliding_layer_refuses_changes_no_other(forward, tokens):
    mixed = {"num_hidden_layers": 2, "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo3", **COMMON, **mixed)).eval()
    ids, cache = tokens(1, 100), TurboCache(model.config, QUANTIZED)
    forward(model, "turbo", ids, [60, 30], cache)
    with pytest.raises(InputError, match="with a window"):
        cache.crop(-60)
    assert [layer.get_seq_length() for layer in cache.layers] == [90] * 2
    assert cache.layers[0].kv.seq_lens.tolist() == [90]
