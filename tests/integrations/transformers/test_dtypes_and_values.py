"""Changes by layers between `update` and attention: other dtypes are aligned, other values raise an error."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turboattention import TurboConfig
from turboattention.errors import InputError, UnsupportedError
from turboattention.integrations.transformers import TurboCache
from turboattention.integrations.transformers.attention import turbo_attention_forward

SMALL = TurboConfig(block_size=16, sink_tokens=16, guard="off")


class TestValues:
    def test_changed_after_update_are_refused(self, tiny, tokens, forward, monkeypatch):
        """They would be silently ignored, because attention reads the values in the cache."""
        model, cache = tiny("llama"), None
        original = TurboCache.update

        def change(*args):
            key, value = original(*args)
            return key, value * 2

        cache = TurboCache(model.config, SMALL)
        with monkeypatch.context() as patch:
            patch.setattr(TurboCache, "update", change)
            with pytest.raises(UnsupportedError, match=r"layer 0, got others: .* 'llama' .* changes values"):
                forward(model, "turbo", tokens(1, 8), [8], cache)
        cache.reset()
        forward(model, "turbo", tokens(1, 8), [8], cache)

    def test_a_second_call_with_other_values_is_refused(self, tiny):
        model = tiny("llama")
        cache = TurboCache(model.config, SMALL.replace(exact_rows=0))
        q, k, v = torch.randn(1, 4, 5, 64), *torch.randn(2, 1, 2, 5, 64)
        key, value = cache.update(k, v, 0)
        module = torch.nn.Module()
        first, _ = turbo_attention_forward(module, q, key, value, None)
        again, _ = turbo_attention_forward(module, q, key, value, None)
        torch.testing.assert_close(first, again)
        with pytest.raises(UnsupportedError, match="changes values after the cache"):
            turbo_attention_forward(module, q, key, value + 1, None)
        assert cache.get_seq_length() == 5

    @pytest.mark.parametrize("changed", [0, 1], ids=["key", "value"])
    @pytest.mark.parametrize("calls_before", [0, 1])
    def test_those_modified_in_place_are_refused(self, changed, calls_before, tiny):
        """Attention reads the values in the cache, which an in-place change does not affect."""
        model, module = tiny("llama"), torch.nn.Module()
        cache = TurboCache(model.config, SMALL)
        q, k, v = torch.randn(1, 4, 5, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
        pair = cache.update(k, v, 0)
        for _ in range(calls_before):
            turbo_attention_forward(module, q, *pair, None)
        pair[changed].mul_(2.0)
        with pytest.raises(UnsupportedError, match=r"layer 0, got others: .* 'llama' .* in place after the cache"):
            turbo_attention_forward(module, q, *pair, None)
        assert cache.get_seq_length() == 5 * calls_before

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_padding_may_be_nan(self, mode, tiny, tokens):
        model = tiny("llama")
        cache = TurboCache(model.config, SMALL)
        model.set_attn_implementation("turbo")
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :4] = 0
        with mode():
            embedded = model.get_input_embeddings()(tokens(2, 9)).clone()
            embedded[0, :4] = torch.nan
            out = model(inputs_embeds=embedded, attention_mask=mask, past_key_values=cache).logits
        assert bool(out[0, 4:].isfinite().all())
        assert bool(out[1].isfinite().all())

    @pytest.mark.parametrize("kind", ["diffllama", "doge"])
    def test_architectures_that_need_them_are_refused_at_the_start(self, kind):
        config = AutoConfig.for_model(kind, num_hidden_layers=2)
        with pytest.raises(UnsupportedError, match=f"the architecture '{kind}' is not supported"):
            TurboCache(config)


class TestAutocast:
    @pytest.mark.parametrize("pieces", [[40], [33, 1, 6], [1] * 40])
    def test_with_a_turbo_cache(self, pieces, tiny, tokens, forward, distance):
        """Rotary embedding leaves queries and keys in float32, values are bfloat16."""
        model, ids = tiny("llama"), tokens(2, 40)
        want = forward(model, "turbo", ids, pieces, TurboCache(model.config, SMALL))
        cache = TurboCache(model.config, SMALL)
        with torch.autocast("cpu", torch.bfloat16):
            got = forward(model, "turbo", ids, pieces, cache)
        assert distance(got.float(), want) < 0.1
        assert cache.layers[0].kv.dtype == torch.bfloat16

    def test_without_any_cache(self, tiny, tokens, forward, distance):
        model, ids = tiny("llama"), tokens(2, 40)
        want = forward(model, "turbo", ids)
        with torch.autocast("cpu", torch.bfloat16):
            got = forward(model, "turbo", ids)
        assert distance(got.float(), want) < 0.1

    def test_a_cache_goes_on_in_and_out_of_it(self, tiny, tokens, forward):
        model, ids = tiny("llama"), tokens(1, 60)
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", ids[:, :20], [20], cache)
        with torch.autocast("cpu", torch.bfloat16):
            forward(model, "turbo", ids[:, :40], [20], cache)
        forward(model, "turbo", ids, [1] * 20, cache)
        assert cache.get_seq_length() == 60


class TestGemma4:
    SIZES: ClassVar = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
        "sliding_window": 24,
    }  # fmt: skip

    def test_heads_that_are_too_wide(self):
        assert len(TurboCache(AutoConfig.for_model("gemma4_text")).layers) == 30  # of 256 and 512 channels
        config = AutoConfig.for_model("gemma4_text", global_head_dim=640)
        with pytest.raises(UnsupportedError, match=r"head_dim of up to 512 .* got 640 in layer"):
            TurboCache(config)

    @pytest.mark.parametrize("core", ["exact_core", None])
    def test_heads_of_512_channels(self, core, tokens, forward, distance, request):
        if core:
            request.getfixturevalue(core)
        sizes = {**self.SIZES, "head_dim": 16, "global_head_dim": 512, "num_kv_shared_layers": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **sizes)).eval()
        ids, cache = tokens(1, 150), TurboCache(model.config, TurboConfig(bits=8, guard="off"))
        got = forward(model, "turbo", ids, [140, 1, 9], cache)
        assert {layer.kv.head_dim for layer in cache.layers} == {16, 512}
        assert distance(got, forward(model, "eager", ids)) < (1e-5 if core else 0.2)

    @pytest.mark.parametrize("shared", [0, 2])
    @pytest.mark.parametrize("cached", [True, False])
    def test_small_heads_work(self, shared, cached, tokens, forward, distance):
        config = AutoConfig.for_model(
            "gemma4_text",
            **self.SIZES,
            head_dim=16,
            global_head_dim=32,
            num_kv_shared_layers=shared,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
        torch.manual_seed(0)
        model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(2, 40)
        want = forward(model, "eager", ids)
        cache = TurboCache(config, SMALL) if cached else None
        got = forward(model, "turbo", ids, [30, 1, 9] if cached else None, cache)
        assert distance(got, want) < 0.2


class TestBrokenForward:
    @pytest.mark.parametrize("layer", [0, 1, 2])
    @pytest.mark.parametrize("before", [0, 9])
    def test_the_advice_works(self, layer, before, tiny, tokens, forward, monkeypatch):
        model, ids = tiny("llama"), tokens(1, 21)
        cache = TurboCache(model.config, SMALL)
        if before:
            forward(model, "turbo", ids[:, :before], [before], cache)

        def fail(*_, **__):
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[layer].mlp, "forward", fail)
            with pytest.raises(RuntimeError, match="broken"):
                forward(model, "turbo", ids, [20 - before], cache)
        if layer < 2:
            with pytest.raises(InputError, match="an earlier forward failed") as refused:
                forward(model, "turbo", ids, [1], cache)
            assert ("crop(" in str(refused.value)) is (before > 0)
        cache.crop(before) if before else cache.reset()
        want = forward(model, "turbo", ids, [before, 21 - before] if before else [21], TurboCache(model.config, SMALL))
        got = forward(model, "turbo", ids, [21 - before], cache)
        torch.testing.assert_close(got, want[:, before:])

    def test_the_same_prompt_again(self, tiny, tokens, monkeypatch):
        """The broken forward is named, not the prompt."""
        model, ids = tiny("llama"), tokens(1, 21)
        model.set_attn_implementation("turbo")
        cache = TurboCache(model.config, SMALL)

        def fail(*_, **__):
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", fail)
            with pytest.raises(RuntimeError, match="broken"):
                model.generate(ids, past_key_values=cache, max_new_tokens=2)
        with pytest.raises(InputError, match=r"an earlier forward failed .*reset\(\) empties the cache"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
        cache.reset()
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
