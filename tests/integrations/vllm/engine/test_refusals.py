"""Unsupported features raise an error when the engine starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType

from turboattention.errors import ConfigError, UnsupportedError

from .models import MODEL, load


def layer(**changes: Any) -> dict[str, Any]:
    plain = dict(alibi_slopes=None, sinks=None, kv_cache_dtype="auto", attn_type="decoder", kv_sharing_target=None)
    return {**plain, "device_type": "cpu", "others": {}, **changes}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sinks": [0.5], "device_type": "cuda"}, "attention sinks on GPUs"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' (leave it \"auto\""),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder_decoder attention"),
        ({"kv_sharing_target": "model.layers.0"}, "layers that share the cache of another (model.layers.0)"),
        ({"others": {"use_irope": True, "quiet": None}}, "an attention layer with use_irope"),
    ],
)
def test_layers(changes: dict[str, Any], named: str) -> None:
    from turboattention.integrations.vllm.refusals import refuse_layer

    wanted = re.escape(f"TurboAttention does not support {named}") + ".*unset TURBOATTENTION_VLLM"
    with pytest.raises(UnsupportedError, match=wanted):
        refuse_layer(64, **layer(**changes))
    refuse_layer(64, **layer(sinks=[0.5]))


@pytest.mark.parametrize("device, largest", [("cpu", 512), ("cuda", 256)])
def test_head_dims(device: str, largest: int) -> None:
    from turboattention.integrations.vllm.refusals import refuse_layer

    for size in (largest + 8, 20, 0):
        wanted = f"TurboAttention does not support head_dim {size} (a multiple of 8 up to {largest} is needed) in vLLM"
        with pytest.raises(UnsupportedError, match=re.escape(wanted)):
            refuse_layer(size, **layer(device_type=device))
    refuse_layer(largest, **layer(device_type=device))


def drafts(method: str, **changes: Any) -> Any:
    return SimpleNamespace(**{"method": method, "num_speculative_tokens": 3, "parallel_drafting": False, **changes})


def connector(name: str = "ExampleConnector") -> Any:
    return SimpleNamespace(is_kv_transfer_instance=True, kv_connector=name)


def engine(**changes: Any) -> Any:
    values = dict(
        block_size=128,
        user_specified_block_size=True,
        is_hybrid=False,
        hf_text_config=SimpleNamespace(model_type="falcon_h1"),
        enable_prefix_caching=False,
        is_mm_prefix_lm=False,
        use_non_causal=False,
        rswa_window=None,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        use_ubatching=False,
        data_parallel_size=1,
        world_size=1,
        device_type="cpu",
        transfer=None,
        drafts=None,
        architecture="LlamaForCausalLM",
        backend=None,
    )
    values.update(changes)
    part = SimpleNamespace(**values)
    return SimpleNamespace(
        cache_config=part,
        model_config=part,
        attention_config=part,
        parallel_config=part,
        device_config=part,
        kv_transfer_config=part.transfer,
        speculative_config=part.drafts,
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"block_size": 32}, "--block-size 32 (a multiple of 64 is needed)"),
        (
            {"is_hybrid": True, "device_type": "cuda"},
            "models that mix attention with recurrent layers on GPUs (not tested)",
        ),
        (
            {"is_hybrid": True, "hf_text_config": SimpleNamespace(model_type="zaya"), "enable_prefix_caching": True},
            "this mix of attention and recurrent layers (model: expected one of falcon_h1, granitemoehybrid, "
            "nemotron_h, qwen3_next, got 'zaya', which was not tested)",
        ),
        ({"is_hybrid": True, "enable_prefix_caching": True}, "prefix caching in models that mix attention with"),
        ({"is_mm_prefix_lm": True}, "attention that is not causal among the tokens of an image (use --language-mod"),
        ({"use_non_causal": True}, "attention that is not causal in vLLM"),
        ({"rswa_window": 100}, "reference sliding windows"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "batches split in two"),
        ({"data_parallel_size": 2, "device_type": "cuda"}, "data parallelism on GPUs"),
        ({"transfer": connector("NixlConnector")}, "the KV connector NixlConnector (not tested, and rows of incompl"),
        ({"transfer": connector(), "device_type": "cuda"}, "the KV connector ExampleConnector on GPUs"),
        ({"transfer": connector()}, "the KV connector ExampleConnector with blocks of 128 tokens (use --block-size"),
        (
            {"transfer": connector(), "block_size": 64, "world_size": 2},
            "the KV connector ExampleConnector with 2 processes per engine",
        ),
        (
            {"transfer": connector(), "block_size": 64, "drafts": drafts("ngram")},
            "the KV connector ExampleConnector with speculative decoding or recurrent layers",
        ),
        (
            {"transfer": connector(), "block_size": 64, "is_hybrid": True},
            "the KV connector ExampleConnector with speculative decoding or recurrent layers",
        ),
        ({"drafts": drafts("suffix")}, "speculative decoding by 'suffix' (only by ngram, draft_model, eagle,"),
        ({"drafts": drafts("medusa")}, "speculative decoding by 'medusa' (only by ngram, draft_model, eagle,"),
        ({"drafts": drafts("ngram"), "is_hybrid": True}, "speculative decoding in models that mix attention with"),
        ({"drafts": drafts("eagle"), "device_type": "cuda"}, "speculative decoding by 'eagle' on GPUs"),
        ({"drafts": drafts("draft_model", parallel_drafting=True)}, "drafts that are computed in parallel"),
        ({"drafts": drafts("ngram", num_speculative_tokens=64)}, "64 speculative tokens"),
        ({"drafts": drafts("mtp", num_speculative_tokens=64)}, "64 speculative tokens"),
    ],
)
def test_engines(changes: dict[str, Any], named: str) -> None:
    from turboattention.integrations.vllm.refusals import refuse_engine

    with pytest.raises(UnsupportedError, match=re.escape(f"TurboAttention does not support {named}")):
        refuse_engine(engine(**changes))
    refuse_engine(engine(drafts=drafts("ngram", num_speculative_tokens=63), data_parallel_size=2))
    refuse_engine(engine(drafts=drafts("eagle3", num_speculative_tokens=63)))
    refuse_engine(engine(is_hybrid=True))
    refuse_engine(engine(transfer=connector(), block_size=64))
    refuse_engine(engine(enable_prefix_caching=True))


SINKS = SimpleNamespace(param_sink_number=4)


@pytest.mark.parametrize(
    "name, changes, refused",
    [
        ("DeepseekV4ForCausalLM", {}, True),
        ("DeepseekV41ForCausalLM", {"device_type": "cuda", "backend": SimpleNamespace(name="CUSTOM")}, True),
        ("DeepseekV4ForCausalLM", {"device_type": "cuda"}, False),  # vLLM's own backend
        ("InklingForCausalLM", {"device_type": "cuda", "backend": SimpleNamespace(name="CUSTOM")}, True),
        ("InklingForCausalLM", {"device_type": "cuda", "backend": SimpleNamespace(name="FLASH_ATTN")}, False),
        ("InklingForCausalLM", {}, False),
        ("PanguUltraMoEForCausalLM", {"device_type": "cuda", "backend": SimpleNamespace(name="CUSTOM")}, False),
        (
            "PanguUltraMoEForCausalLM",
            {"device_type": "cuda", "backend": SimpleNamespace(name="CUSTOM"), "hf_text_config": SINKS},
            True,
        ),
        ("LlamaForCausalLM", {"device_type": "cuda", "backend": SimpleNamespace(name="CUSTOM")}, False),
    ],
)
def test_models_that_ask_for_no_backend(name: str, changes: dict[str, Any], refused: bool) -> None:
    from turboattention.integrations.vllm.bypassing import refuse_bypassing

    asked = engine(architecture=name, **changes)
    wanted = f"does not support the architecture {name} (its attention layers have caches of their own, which would"
    with pytest.raises(UnsupportedError, match=re.escape(wanted)) if refused else nullcontext():
        refuse_bypassing(asked)


def test_vllm_asks_about_the_models_that_ask_for_no_backend() -> None:
    """Before its own checks; each is one that vLLM knows."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from turboattention.integrations.vllm import register
    from turboattention.integrations.vllm.bypassing import BYPASSING

    register()
    before = dict(MODELS_CONFIG_MAP)
    register()
    assert before == MODELS_CONFIG_MAP
    assert set(BYPASSING) <= set(ModelRegistry.get_supported_archs())
    for name in BYPASSING:
        assert MODELS_CONFIG_MAP[name].refuses_bypassing
    asked = engine(architecture="DeepseekV4ForCausalLM")
    with pytest.raises(UnsupportedError, match="the architecture DeepseekV4ForCausalLM"):
        MODELS_CONFIG_MAP["DeepseekV4ForCausalLM"].verify_and_update_config(asked)
    assert MODELS_CONFIG_MAP["DeepseekV4ForCausalLM"].__mro__[1].__name__ == "DeepseekV4ForCausalLMConfig"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"drafts": drafts("mtp")}, "a calibration with speculative decoding by 'mtp', whose layers it does not cover"),
        ({"is_hybrid": True}, "a calibration of models that mix attention with recurrent layers"),
    ],
)
def test_calibrations(changes: dict[str, Any], named: str) -> None:
    from turboattention.integrations.vllm.refusals import refuse_calibration

    with pytest.raises(UnsupportedError, match=re.escape(f"TurboAttention does not support {named} in vLLM")):
        refuse_calibration(engine(**changes))
    refuse_calibration(engine(drafts=drafts("ngram")))


def test_block_sizes_that_nobody_asked_for() -> None:
    """On GPUs vLLM still has its own default when layers are made, and then asks the backend, which wants 64."""
    from vllm.config import CacheConfig

    from turboattention.integrations.vllm.backend import TurboBackend
    from turboattention.integrations.vllm.refusals import refuse_engine

    default = CacheConfig()
    assert default.block_size % 64
    refuse_engine(engine(block_size=default.block_size, user_specified_block_size=default.user_specified_block_size))
    assert TurboBackend.get_preferred_block_size(default.block_size) == 64


def test_kinds_of_layers() -> None:
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    from turboattention.integrations.vllm.metadata import check_spec

    shape = dict(num_kv_heads=2, head_size=64, dtype=torch.uint8)
    check_spec(FullAttentionSpec(block_size=64, **shape))
    for named, spec in (
        ("--block-size 32 (a multiple of 64 is needed)", FullAttentionSpec(block_size=32, **shape)),
        (
            "chunked local attention (ChunkedLocalAttentionSpec)",
            ChunkedLocalAttentionSpec(block_size=64, attention_chunk_size=128, **shape),
        ),
    ):
        wanted = re.escape(f"TurboAttention does not support {named} in vLLM; unset ")
        with pytest.raises(UnsupportedError, match=wanted):
            check_spec(spec)


SMALL = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
LATENT = dict(
    kv_lora_rank=512,
    q_lora_rank=64,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
"""DeepSeek's latents, and few small experts."""
MIMO = dict(
    head_dim=64,
    v_head_dim=32,
    layernorm_epsilon=1e-5,
    hidden_act="silu",
    hybrid_layer_pattern=[0, 1],
    moe_layer_freq=[0, 0],
    sliding_window_size=64,
    swa_head_dim=64,
    swa_v_head_dim=32,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
)
"""MiMo-V2's narrow values, as its published configuration has them, in layers with and without a window."""


@pytest.mark.parametrize(
    "kind, changes, named",
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
        ("Llama", {"head_dim": 20}, "head_dim 20 (a multiple of 8 up to 512 is needed)"),
        (
            "DeepseekV2",
            LATENT,
            "multi-head latent attention (model: expected one that caches keys and values, got "
            "'deepseek_v2' with cached latents, which are smaller than quantized keys and values of all heads)",
        ),
        (
            "DeepseekV3",
            LATENT,
            "multi-head latent attention (model: expected one that caches keys and values, got 'deepseek_v3'",
        ),
        (
            "MiMoV2Flash",
            MIMO,
            "values with a head_dim of their own (model: expected one with the same head_dim for keys and values, got "
            "'mimo_v2_flash', for which vLLM selects another attention backend, whose cache is not quantized)",
        ),
        (
            "Lfm2",
            {"layer_types": ["full_attention", "conv"]},
            "this mix of attention and recurrent layers (model: expected one of falcon_h1, granitemoehybrid, "
            "nemotron_h, qwen3_next, got 'lfm2', which vLLM 0.32.0 itself computes wrongly on CPUs)",
        ),
    ],
)
def test_models(start, tmp_path, kind: str, changes: dict[str, Any], named: str) -> None:
    """As vLLM itself makes them, with random weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL, **changes)
    config.architectures = [f"{kind}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedError, match=re.escape(f"TurboAttention does not support {named}") + ".* in vLLM; unset"
    ):
        start(model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512)


def test_a_model_that_asks_for_no_backend(start, tmp_path) -> None:
    """Before vLLM makes it."""
    config = {**SMALL, "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = "does not support the architecture DeepseekV4ForCausalLM (its attention layers have caches of their own"
    with pytest.raises(UnsupportedError, match=re.escape(named)):
        start(model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512)


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"block_size": 32}, UnsupportedError, "--block-size 32"),
        ({"kv_cache_dtype": "fp8"}, UnsupportedError, "kv_cache_dtype 'fp8'"),
        ({"kv_offloading_size": 1.0}, UnsupportedError, "the KV connector OffloadingConnector (not tested, and"),
        ({"additional_config": {"turboattention": {"bits": "mixed"}}}, ConfigError, '"mixed" needs a calibration'),
    ],
)
def test_engines_that_do_not_start(start, options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=re.escape(named)):
        start(**options)


def refused(**options: Any) -> str:
    """The last line of a process that starts such an engine: where vLLM was about to draft, it can start no other."""
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, **options}
    script = f"from vllm import LLM; LLM({str(MODEL)!r}, **{options})"
    given = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    (line,) = [line for line in ran.stderr.splitlines() if "UnsupportedError: " in line]
    return line


def test_one_draft_too_many() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 64, "prompt_lookup_max": 2}
    wanted = "64 speculative tokens (fewer than 64 are supported) in vLLM; unset TURBOATTENTION_VLLM"
    assert f"TurboAttention does not support {wanted}" in refused(speculative_config=ngram)


def test_calibrations_of_other_models(start, token_ids, tmp_path) -> None:
    from turboattention.integrations.transformers import calibrate

    model = load(MODEL)
    model.config.vocab_size += 1  # as another model's would be
    calibrate(model, token_ids[2000:2256], budget=3.0, length=256).save(tmp_path)
    named = "calibration: expected one of this model (vocab_size="
    with pytest.raises(ConfigError, match=re.escape(named)):
        start(additional_config={"turboattention": {"calibration": str(tmp_path)}})


def test_devices(monkeypatch) -> None:
    from turboattention import TurboConfig, dispatch
    from turboattention.integrations.vllm.refusals import refuse_device

    where = TurboConfig.serving(), torch.float32, torch.device("cpu")
    refuse_device(*where)
    for name in ("cpu", "triton"):
        missing = dispatch.Availability(name, False, "")
        monkeypatch.setattr(type(dispatch.TABLE[name]), "availability", lambda self, missing=missing: missing)
    named = "does not support cpu here (backend: expected one of cpu, triton for pages, got 'reference')"
    with pytest.raises(UnsupportedError, match=re.escape(named)):
        refuse_device(*where)


def test_multi_head_latent_attention() -> None:
    from turboattention.integrations.vllm.backend import RefusedMLA

    named = r"does not support multi-head latent attention \(model: expected one .*, got one with .*\) in vLLM; unset"
    with pytest.raises(UnsupportedError, match=named):
        RefusedMLA.get_impl_cls()


def test_values_with_a_head_dim_of_their_own() -> None:
    """From either backend, whatever the model asks first."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from turboattention.integrations.vllm import register

    register()
    for name in ("FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"):
        backend: Any = AttentionBackendEnum[name].get_class()
        for ask in (
            lambda backend=backend: backend.set_head_size_v(128),
            lambda backend=backend: backend.is_supported_on_current_device(head_size=192, head_size_v=128, has_sinks=0),
            backend.get_impl_cls,
        ):
            with pytest.raises(UnsupportedError, match="does not support values with a head_dim of their own"):
                ask()
