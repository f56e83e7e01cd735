"""Unsupported models and calls raise an error that names the reason, before they give wrong tokens."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mistral import modeling_mistral

from turboattention import TurboConfig, api
from turboattention.errors import BackendError, ConfigError, InputError, ShapeError, TurboError, UnsupportedError
from turboattention.integrations.transformers import TurboCache
from turboattention.integrations.transformers.attention import turbo_attention_forward
from turboattention.integrations.transformers.guarded_mask import check_declared

OWN_ATTENTION = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "codegen": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32},
}

LATENT = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 96),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "qk_rope_head_dim": 8,
    "index_topk": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
}
"""Tiny sizes of DeepSeek's models."""

SMALL = TurboConfig(block_size=16, sink_tokens=16, guard="off")


class TestOtherAttention:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("layers", [1, 3])
    def test_is_noticed_before_it_could_matter(self, attention, layers, tiny, tokens):
        model = tiny("llama", num_hidden_layers=layers)
        model.set_attn_implementation(attention)
        ids, settings = tokens(1, 8), {"past_key_values": TurboCache(model.config), "max_new_tokens": 4}
        with pytest.raises(InputError, match=r'attn_implementation: expected "turbo".* layer 0'):
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def test_nothing_else_can_be_done_with_the_cache(self, tiny, tokens, forward, tmp_path):
        model = tiny("llama", num_hidden_layers=1)
        cache = TurboCache(model.config)
        forward(model, "eager", tokens(1, 8), [8], cache)
        for action in (
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.get_mask_sizes(1, 0),
            lambda: cache.save(tmp_path / "cache"),
            cache.clone,
        ):
            with pytest.raises(InputError, match="attn_implementation"):
                action()
        cache.reset()
        forward(model, "turbo", tokens(1, 8), [8], cache)

    def test_keys_changed_behind_the_cache_are_noticed(self, tiny, tokens, forward, monkeypatch):
        """Some architectures transform what `update` returns; the handle is then gone."""
        model = tiny("llama")
        original = TurboCache.update
        monkeypatch.setattr(TurboCache, "update", lambda *args: tuple(x * 1 for x in original(*args)))
        with pytest.raises(InputError, match=r"architecture 'llama' is not supported: .* changes keys after"):
            forward(model, "turbo", tokens(1, 8), [8], TurboCache(model.config))


class TestModels:
    @pytest.mark.parametrize("make", [TurboCache, DynamicCache, StaticCache], ids=lambda x: x.__name__)
    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize(("kind", "sizes"), OWN_ATTENTION.items())
    def test_attention_of_its_own(self, kind, sizes, rows, make, tokens):
        """These take "turbo" without a word, and would take its masks for theirs: wrong logits, or a foreign error."""
        config = AutoConfig.for_model(kind, vocab_size=96, **sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="turbo").eval()
        options = {"max_cache_len": 20} if make is StaticCache else {}
        cache = TurboCache(config) if make is TurboCache else make(config=config, **options)
        with torch.no_grad(), pytest.raises(UnsupportedError, match=f"architecture '{kind}' is not supported with"):
            model(tokens(rows, 8), past_key_values=cache)

    @pytest.mark.parametrize("kind", ["paligemma", "llama", "bart"])
    def test_what_transformers_declares(self, kind):
        """PaliGemma makes masks for layers of another module; Bart has the interface and does not declare it."""
        import_module(f"transformers.models.{kind}.modeling_{kind}")
        check_declared(AutoConfig.for_model(kind))

    def test_pictures_by_the_interface_and_text_without(self):
        with pytest.raises(UnsupportedError, match="architecture 'git' is not supported"):
            check_declared(AutoConfig.for_model("git"))

    @pytest.mark.parametrize("kind", ["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"])
    def test_keys_chosen_by_masks(self, kind):
        """Masks for a static cache are plain tensors, and their indexers would add "visible" to scores as 1."""
        if kind not in CONFIG_MAPPING:
            pytest.skip(f"this release of transformers has no {kind}")
        with pytest.raises(UnsupportedError, match=f"architecture '{kind}' is not supported"):
            check_declared(AutoConfig.for_model(kind))

    @pytest.mark.parametrize(
        ("kind", "why"),
        [
            ("blt", "a cache each"),
            ("mllama", "an image's keys"),
            ("openai-gpt", "does not take past_key_values"),
            ("prophetnet", "computes attention by itself"),
            ("gemma4_assistant", "the model that it assists"),
        ],
    )
    def test_caches_that_are_none_of_ours(self, kind, why):
        if kind not in CONFIG_MAPPING:
            pytest.skip(f"this release of transformers has no {kind}")
        sizes = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        config = AutoConfig.for_model(kind, **({"text_config": sizes} if kind == "gemma4_assistant" else {}))
        with pytest.raises(UnsupportedError, match=why):
            TurboCache(config)

    def test_attention_of_its_own_with_masks_of_its_own(self, tokens):
        config = AutoConfig.for_model(
            "falcon", vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        model.set_attn_implementation("turbo")
        with pytest.raises(InputError, match="architecture 'falcon' is not supported: it does not call"):
            model.generate(tokens(1, 8), past_key_values=TurboCache(config), max_new_tokens=2)

    @pytest.mark.parametrize("pieces", [[25], [10, 14, 1], [24, 1]])
    def test_masks_without_the_window_of_the_cache(self, pieces, tiny, tokens, forward, monkeypatch):
        """As in Moshi. Up to the window nothing differs."""
        model, ids = tiny("mistral"), tokens(1, 25)
        monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", create_causal_mask)
        cache = TurboCache(model.config, SMALL)
        with pytest.raises(UnsupportedError, match=r"window of 24 .* 25 tokens: the architecture 'mistral'"):
            forward(model, "turbo", ids, pieces, cache)
        assert cache.get_seq_length() == 25 - pieces[-1]

    def test_keys_read_from_the_cache(self, tiny, tokens, forward):
        model = tiny("llama")
        cache = TurboCache(model.config)
        forward(model, "turbo", tokens(1, 8), [8], cache)
        for name in ("keys", "values"):
            with pytest.raises(UnsupportedError, match=r"'llama' is not supported: it reads keys or values .* layer 1"):
                getattr(cache.layers[1], name)

    @pytest.mark.parametrize(
        ("kind", "advice"),
        [
            ("deepseek_v3", "leave past_key_values out to attend in INT8"),
            ("deepseek_v32", 'attn_implementation="eager" and leave past_key_values out'),
            ("dots3_note_text", 'attn_implementation="eager" and leave past_key_values out'),  # ranks of each layer
        ],
    )
    def test_latent_attention(self, kind, advice):
        if kind not in CONFIG_MAPPING:
            pytest.skip(f"this release of transformers has no {kind}")
        message = f"expected a model that caches keys and values, got the architecture '{kind}', .*MLA.*{advice}"
        with pytest.raises(UnsupportedError, match=message):
            TurboCache(AutoConfig.for_model(kind))

    @pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
    def test_advice_for_latent_attention(self, kind, tokens):
        """What the message says works: without a cache of ours, and by eager attention where "turbo" is refused."""
        if kind not in CONFIG_MAPPING:
            pytest.skip(f"this release of transformers has no {kind}")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LATENT), attn_implementation="turbo")
        settings = {"attention_mask": torch.ones(1, 8, dtype=torch.int64), "max_new_tokens": 3, "do_sample": False}
        with pytest.raises(UnsupportedError) as refused:
            TurboCache(model.config)
        if "eager" in str(refused.value):
            with pytest.raises(UnsupportedError, match='not supported with "turbo"'):
                model.generate(tokens(1, 8), **settings)
            model.set_attn_implementation("eager")
        assert model.generate(tokens(1, 8), **settings).shape == (1, 11)

    def test_encoder_decoder(self):
        with pytest.raises(UnsupportedError, match="got a model with an encoder"):
            TurboCache(BartConfig())

    @pytest.mark.parametrize(("name", "value"), [("add_cross_attention", True), ("cross_attention_layers", [1])])
    def test_cross_attention(self, name, value):
        config = LlamaConfig(num_hidden_layers=2)
        setattr(config, name, value)
        with pytest.raises(UnsupportedError, match="cross-attention"):
            TurboCache(config)

    def test_keys_and_values_of_different_width(self, tiny):
        """They are stored as they are, but the same in every forward."""
        cache, q = TurboCache(tiny("llama").config), torch.ones(1, 4, 3, 64)
        key, value = cache.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 32), 0)
        assert turbo_attention_forward(torch.nn.Module(), q, key, value, None)[0].shape == (1, 3, 4, 32)
        with pytest.raises(ShapeError, match=r"\(1, 2, 64, 32\) as in layer 0 of the TurboCache, got \(1, 2, 64, 64\)"):
            cache.layers[0].update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))
        with pytest.raises(UnsupportedError, match="expected the batch, heads and tokens of key_states"):
            cache.layers[0].update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 2, 32))

    @pytest.mark.parametrize("config", ["llama", None, torch.nn.Linear(1, 1)])
    def test_not_a_config(self, config):
        with pytest.raises(InputError, match=r"model_config: expected a transformers config \(model.config\)"):
            TurboCache(config)

    def test_not_a_turbo_config(self, tiny):
        with pytest.raises(ConfigError, match="config: expected a TurboConfig"):
            TurboCache(tiny("llama").config, {"bits": 4})

    def test_backends_are_checked_at_once(self, tiny, forward, tokens, tmp_path):
        model = tiny("llama")
        with pytest.raises(InputError, match="backend: expected"):
            TurboCache(model.config, backend="cuda")
        with pytest.raises(BackendError, match="backend: expected"):
            TurboCache(model.config, backend="triton")
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", tokens(1, 8), [8], cache)
        cache.save(tmp_path / "cache")
        with pytest.raises(InputError, match="backend: expected"):
            TurboCache.load(tmp_path / "cache", backend="cuda")


class TestCrossAttention:
    """Decoders that attend to an encoder, too: their own tokens are in the `TurboCache`, its in another."""

    @pytest.fixture
    def run(self, tokens):
        sizes = {"vocab_size": 96, "d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 32}
        config = AutoConfig.for_model("bart", **sizes, decoder_attention_heads=2, encoder_attention_heads=2)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.12)
        said = torch.randn(2, 20, 32)

        def forwards(attention, make):
            model.set_attn_implementation(attention)
            cache, ids, logits = make(model.config), tokens(2, 22), []
            with torch.no_grad():
                for piece in ids.split([20, 1, 1], 1):
                    out = model(piece, encoder_hidden_states=said, past_key_values=cache, use_cache=True)
                    logits.append(out.logits)
            return torch.cat(logits, 1)

        return forwards

    def test_with_a_cache_for_each(self, exact_core, run):
        want = run(
            "eager", lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        )
        got = run("turbo", lambda config: EncoderDecoderCache(TurboCache(config), DynamicCache(config=config)))
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize(
        "make", [TurboCache, lambda config: EncoderDecoderCache(DynamicCache(config=config), TurboCache(config))]
    )
    def test_a_turbo_cache_does_not_hold_the_encoders(self, make, run):
        with pytest.raises(TurboError, match=r"pass EncoderDecoderCache\(|reads keys"):
            run("turbo", make)


class TestACacheOfAnotherModel:
    def test_with_fewer_layers(self, tiny, forward, tokens):
        cache = TurboCache(tiny("llama", num_hidden_layers=2).config)
        with pytest.raises(InputError, match="num_hidden_layers=3"):
            forward(tiny("llama"), "turbo", tokens(1, 4), [4], cache)

    def test_with_other_heads(self, tiny, forward, tokens):
        cache = TurboCache(tiny("llama").config)
        with pytest.raises(InputError, match="num_key_value_heads=4"):
            forward(tiny("llama", num_key_value_heads=4), "turbo", tokens(1, 4), [4], cache)

    def test_layers_that_do_not_exist(self, tiny):
        cache = TurboCache(tiny("llama").config)
        with pytest.raises(InputError, match="has a layer 3; got one made for 3 layers"):
            cache.update(torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 64), 3)

    def test_another_batch(self, tiny, forward, tokens):
        model = tiny("llama")
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", tokens(1, 8), [8], cache)
        with pytest.raises(ShapeError, match=r"\(1, 2, 64, 64\) .* got \(4, 2, 64, 64\); repeat it with batch"):
            forward(model, "turbo", tokens(4, 9), [1], cache)


class TestCalls:
    @pytest.mark.parametrize("cached", [True, False])
    def test_gradients(self, cached, tiny, tokens):
        model = tiny("llama")
        model.set_attn_implementation("turbo")
        with pytest.raises(UnsupportedError, match=r"gradients: .*no_grad"):
            model(tokens(1, 4), past_key_values=TurboCache(model.config) if cached else None)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("dropout", 0.1), ("output_attentions", True), ("position_bias", torch.ones(1)), ("cache", object())],
    )
    def test_arguments(self, argument, value):
        x = torch.ones(1, 2, 3, 8)
        with pytest.raises(UnsupportedError, match=argument):
            turbo_attention_forward(torch.nn.Module(), x, x, x, None, **{argument: value})

    def test_queries_that_are_not_the_new_tokens(self, tiny):
        model = tiny("llama")
        cache = TurboCache(model.config, SMALL)
        key, value = cache.update(torch.ones(1, 2, 5, 64), torch.ones(1, 2, 5, 64), 0)
        with pytest.raises(UnsupportedError, match="cross-attention"):
            turbo_attention_forward(torch.nn.Module(), torch.ones(1, 4, 3, 64), key, value, None)

    def test_head_dims_the_core_cannot_take(self, tokens):
        config = LlamaConfig(
            vocab_size=96, hidden_size=40, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, head_dim=10
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="turbo").eval()
        with pytest.raises(UnsupportedError, match="head_dim of up to 512 in multiples of 8, got 10"):
            TurboCache(model.config)
        with pytest.raises(ShapeError, match="head_dim"), torch.no_grad():
            model(tokens(1, 4), use_cache=False)

    def test_offloading(self, tiny):
        layer = TurboCache(tiny("llama").config).layers[0]
        for action in (layer.offload, layer.prefetch):
            with pytest.raises(UnsupportedError, match="offload"):
                action()


class TestNoNewTokens:
    """A prompt for a cache begins with its tokens and is longer: `generate` cuts them off, whatever is left."""

    @pytest.fixture
    def model(self, tiny):
        model = tiny("llama")
        model.set_attn_implementation("turbo")
        return model

    @pytest.fixture
    def cache(self, model, forward, tokens):
        """Of 37 tokens, the first 30 of them a prompt."""
        cache = TurboCache(model.config, SMALL, check_prompts=False)
        forward(model, "turbo", tokens(1, 37), [30, 7], cache)
        return cache

    def generate(self, model, cache, ids):
        return model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)

    @pytest.mark.parametrize("length", [0, 5, 18, 19, 30, 36, 37])
    def test_a_prompt_no_longer_than_the_cache(self, length, model, cache, forward, tokens):
        with pytest.raises(InputError, match=r"^(input_ids|attention_mask): expected "):  # by release of transformers
            self.generate(model, cache, tokens(1, 37)[:, :length])
        assert {layer.get_seq_length() for layer in cache.layers} == {37}
        result = forward(model, "turbo", tokens(1, 40), [3], cache)
        again = TurboCache(model.config, SMALL)
        assert torch.equal(result, forward(model, "turbo", tokens(1, 40), [30, 7, 3], again)[:, 37:])

    @pytest.mark.parametrize(
        "positions, shown",
        [
            ([34, 35, 36], "34, 35, 36"),  # all inside
            ([36, 37, 38, 39, 40], "36, 37, …, 40"),  # the first inside
            ([40, 38, 38], "40, 38, 38"),  # the last behind its place
            ([37, 38, 0], "37, 38, 0"),
        ],
    )
    def test_positions_that_do_not_go_on(self, positions, shown, model, cache, tokens):
        message = rf"^input_ids: expected new tokens after the 37 that .*, got some at positions {shown}; .* needs pos"
        ids = tokens(1, len(positions))
        with pytest.raises(InputError, match=message), torch.no_grad():
            model(ids, position_ids=torch.tensor([positions]), past_key_values=cache)
        going_on = torch.arange(37, 37 + len(positions))[None]
        with torch.no_grad():
            model(ids, position_ids=going_on, past_key_values=cache)
        assert cache.get_seq_length() == 37 + len(positions)

    def test_positions_of_one_sequence_of_several(self, model, forward, tokens):
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", tokens(2, 37), [37], cache)
        with pytest.raises(InputError, match=r"got some at positions 37, 37;"), torch.no_grad():
            model(tokens(2, 2), position_ids=torch.tensor([[37, 38], [37, 37]]), past_key_values=cache)

    def test_positions_after_a_gap_are_the_models_own_affair(self, model, cache, forward, tokens, distance):
        own, ids = DynamicCache(config=model.config), tokens(1, 40)
        forward(model, "eager", ids, [37], own)
        results = []
        for implementation, each in (("eager", own), ("turbo", cache)):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                results.append(
                    model(ids[:, 37:], position_ids=torch.tensor([[37, 50, 51]]), past_key_values=each).logits
                )
        assert distance(results[1], results[0]) < 0.1

    def test_a_longer_one_goes_on(self, model, cache, tokens):
        assert self.generate(model, cache, tokens(1, 38)).shape == (1, 41)

    def test_an_empty_forward(self, model, cache):
        with pytest.raises(InputError, match="at least one new token, got none; the TurboCache already holds 37"):
            model(torch.zeros(1, 0, dtype=torch.int64), past_key_values=cache)

    def test_an_empty_prompt(self, model):
        with pytest.raises(InputError, match="at least one new token, got none; the TurboCache already holds 0"):
            model(torch.zeros(1, 0, dtype=torch.int64), past_key_values=TurboCache(model.config))


def test_a_forward_that_broke_off_is_noticed(tiny, forward, tokens, monkeypatch):
    """A layer in the middle failed: earlier layers hold tokens that later ones lack."""
    model, ids = tiny("llama"), tokens(1, 30)
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", ids, [20], cache)
    stage = api.stage

    def broken(kv, *arguments):
        if kv is cache.layers[1].kv:
            raise ShapeError("k: broken")
        return stage(kv, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(api, "stage", broken)
        with pytest.raises(ShapeError, match="broken"):
            forward(model, "turbo", ids, [5], cache)
    with pytest.raises(InputError, match=r"layers of equal length, got \[20, 25\].*crop\(20\)"):
        forward(model, "turbo", ids, [5], cache)
    cache.crop(20)
    result = forward(model, "turbo", ids, [5], cache)
    fresh = TurboCache(model.config, SMALL)
    expected = forward(model, "turbo", ids, [20, 5], fresh)[:, 20:]
    assert float((result - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("new, helps", [(10, True), (40, False)])
def test_the_advice_after_it_works(new, helps, tiny, forward, tokens, monkeypatch):
    """A sliding window cannot go back by more than 16 tokens."""
    model, ids = tiny("gemma3"), tokens(1, 60)
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", ids, [20], cache)

    def broken(*_, **__):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            forward(model, "turbo", ids, [new], cache)
    advice = r"halfway\. crop\(20\) goes back to before it, reset" if helps else r"halfway\. reset\(\) empties"
    with pytest.raises(InputError, match=advice):
        forward(model, "turbo", torch.cat([ids, ids], 1), [5], cache)
    if helps:
        cache.crop(20)
    else:
        cache.reset()
    forward(model, "turbo", ids, [5], cache)
    assert cache.get_seq_length() == 25 if helps else 5


@pytest.mark.parametrize("cached_first", [True, False])
@pytest.mark.parametrize("change", [lambda k, v: (2 * k, v), lambda k, v: (2 * k, 2 * v), lambda k, v: (k.clone(), v)])
def test_a_second_attention_call_with_other_keys(cached_first, change, tiny, tokens, forward, monkeypatch):
    """A prompt passed, and the first decode step ended in an error about the mask."""
    model, cache = tiny("llama"), None
    attend = AttentionInterface._global_mapping["turbo"]

    def twice(module, query, key, value, *arguments, **options):
        pairs = [lambda: (key, value), lambda: change(key, value)]  # made when they are wanted, and dropped
        outs = [attend(module, query, *x(), *arguments, **options)[0] for x in pairs[:: 1 if cached_first else -1]]
        return sum(outs), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "turbo", twice)
    forward(model, "turbo", tokens(1, 20), [20])  # without a cache nothing is wrong
    cache = TurboCache(model.config, SMALL)
    with pytest.raises(
        UnsupportedError, match=r"^key: expected only .* of layer 0, got others .* 'llama' is not suppo"
    ):
        forward(model, "turbo", tokens(1, 20), [20], cache)


def test_a_second_attention_call_over_more_keys(tiny, tokens, forward, monkeypatch):
    """With the first one repeated in front, as a sink."""
    model = tiny("llama")
    attend = AttentionInterface._global_mapping["turbo"]

    def twice(module, query, key, value, *arguments, **options):
        out = attend(module, query, key, value, *arguments, **options)[0]
        more = (torch.cat([x[:, :, :1], x], 2) for x in (key, value))
        return out + attend(module, query, *more, *arguments, **options)[0], None

    monkeypatch.setitem(AttentionInterface._global_mapping, "turbo", twice)
    with pytest.raises(UnsupportedError, match=r"^key: expected only what the TurboCache stored of layer 0"):
        forward(model, "turbo", tokens(1, 20), [20], TurboCache(model.config, SMALL))


def test_a_forward_after_one_that_failed_is_another(tiny, tokens, forward, monkeypatch):
    """The error holds what the failed one had, so its keys and its attention call are still there."""
    model, ids = tiny("llama"), tokens(1, 20)

    def broken(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].self_attn.o_proj, "forward", broken)
        with pytest.raises(RuntimeError, match="broken") as kept:
            forward(model, "turbo", ids, [20], TurboCache(model.config, SMALL))
    forward(model, "turbo", ids, [20])
    assert kept.value is not None


def test_a_model_of_one_layer_with_and_without_a_cache(tiny, tokens, forward):
    """Its attention is called twice in a row, in two forwards."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 20)
    cache = TurboCache(model.config, SMALL)
    for each in (cache, None, TurboCache(model.config, SMALL), None):
        forward(model, "turbo", ids, [20], each)


def test_every_refusal_is_a_turbo_error():
    assert all(issubclass(error, TurboError) for error in (ConfigError, InputError, ShapeError, UnsupportedError))


class TestWithoutKeeping:
    def test_generate(self, tiny, tokens):
        model = tiny("llama")
        model.set_attn_implementation("turbo")
        cache = TurboCache(model.config)
        with pytest.raises(InputError, match=r"^use_cache: expected True with a TurboCache, got False; leave past_key"):
            model.generate(tokens(1, 8), past_key_values=cache, max_new_tokens=2, use_cache=False)
        assert cache.get_seq_length() == 0

    @pytest.mark.parametrize("name", ["llama", "olmo3"])
    def test_a_forward_keeps_its_tokens_all_the_same(self, exact_core, name, tiny, tokens):
        """As with transformers' own caches. Layers of OLMo 3 always pass False to attention."""
        model, ids = tiny(name), tokens(1, 12)
        runs = []
        for attention, cache in (("eager", DynamicCache(config=model.config)), ("turbo", TurboCache(model.config))):
            model.set_attn_implementation(attention)
            with torch.no_grad():
                runs.append(
                    [model(x, past_key_values=cache, use_cache=y).logits for x, y in ((ids, False), (ids, True))]
                )
            assert cache.get_seq_length() == 24
        torch.testing.assert_close(runs[1], runs[0], rtol=2e-4, atol=2e-4)
