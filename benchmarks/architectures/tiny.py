"""Tiny configs of every causal language model that transformers knows: its defaults, with small sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WINDOW, LAYERS = 96, 24, 4

_SIZES: dict[int, str] = {
    0: "pad_token_id",
    1: """bos_token_id n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace num_dense_layers mamba_n_groups mamba_ngroups n_groups num_nextn_predict_layers
        num_mtp_layers moe_layer_start_index n_langs num_codebooks""",
    2: """num_key_value_heads num_experts_per_tok moe_k moe_topk top_k_experts swa_num_key_value_heads
        swa_num_attention_heads num_global_key_value_heads zero_expert_num type_vocab_size max_window_layers
        num_kv_shared_layers sliding_window_pattern
        linear_num_key_heads index_n_heads altup_num_inputs n_layers_per_attn_res_block""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads mamba_n_heads n_mamba_heads
        mamba_num_heads laurel_rank prompt_length adapter_rank gated_norm_rank hc_lowrank ngram_size
        num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers
        num_encoder_layers index_topk_blocks""",
    8: """qk_rope_head_dim mamba_d_state state_size ssm_state_size hidden_size_per_layer_input rotary_dim rel_extent
        d_rel num_buckets index_local_blocks""",
    16: """head_dim dim_head kv_channels q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim swa_head_dim
        swa_v_head_dim global_head_dim index_head_dim index_topk linear_key_head_dim linear_value_head_dim
        linear_head_dim mamba_head_dim mamba_d_head chunk_size mamba_chunk_size o_lora_rank dim_model_base
        attention_head_size index_block_size router_hidden_size query_pre_attn_scalar""",
    24: """sliding_window sliding_window_size attention_chunk_size attention_window_size window_size local_attention
        local_attention_window_len""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size embedding_size emb_dim
        pronunciation_embed_dim shape_embed_dim""",
    64: """hidden_size d_model n_embd word_embed_proj_dim input_embedding_size output_embedding_size lru_width
        backbone_hidden_size prompt_mid_dim""",
    96: """vocab_size unpadded_vocab_size vocab_size_per_layer_input intermediate_size ffn_dim decoder_ffn_dim
        encoder_ffn_dim d_inner dim_ff dff ffn_hidden_size intermediate_size_mlp dense_intermediate_size
        feed_forward_size shared_intermediate_size mamba_intermediate_size pronunciation_vocab_size shape_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab""",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions",
    128: "mamba_d_ssm",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_DOTS3 = {
    "sliding_window": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_GEMMA4 = {"layer_types": _ALTERNATING, "num_kv_shared_layers": 2, "global_head_dim": 32}

CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "clip_qkv": 8.0}}
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {
        name: SIZES[name] for name in "n_routed_experts n_shared_experts n_group topk_group num_experts_per_tok".split()
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": _MAMBA,
    "gemma4": {"text_config": _GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_assistant": {
        "text_config": {
            "layer_types": _ALTERNATING,
            "num_kv_shared_layers": LAYERS,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "xmod": {"default_language": "en_XX"},
    "mimo_v2_flash": {"head_dim": 24, "swa_head_dim": 24},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""By architecture: sizes that would otherwise be contradictory or too large."""

NUMBERED_BY_THE_CALLER = {"bamba"}
"""Architectures whose forward numbers the tokens of every call from 0 unless it gets positions, as from `generate`. All
others number tokens by their cache, which is part of the comparison."""

_DECODERS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""The part of a config that the causal model uses, if transformers does not select it itself."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "qwen2, sliding windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, sliding windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
}
"""Variants by name: options that an architecture's defaults leave off."""


def names() -> list[str]:
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def config(name: str) -> Any:
    """The config of an architecture or a variant."""
    kind, extra = VARIANTS.get(name, (name, {}))
    return AutoConfig.for_model(kind, **_small(CONFIG_MAPPING[kind], {**CHANGES.get(kind, {}), **extra}))


def model(name: str, attention: str = "eager") -> Any:
    """The causal language model of an architecture or a variant, initialized at random."""
    whole = config(name)
    if name not in _DECODERS:
        return AutoModelForCausalLM.from_config(whole, attn_implementation=attention)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)]
    return kind._from_config(getattr(whole, _DECODERS[name]), attn_implementation=attention)


def default(name: str) -> Any:
    """The config with the sizes that transformers gives it, as that of a decoder alone, which causal models make it."""
    kind, extra = VARIANTS.get(name, (name, {}))
    whole = AutoConfig.for_model(kind, **extra)
    whole.is_encoder_decoder = False
    return getattr(whole, _DECODERS[name]) if name in _DECODERS else whole


def _small(kind: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config class, and of the configs inside it."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    sizes: dict[str, Any] = {}
    for name, default in fields.items():
        if name in SIZES and default is not None and not isinstance(default, (list, tuple)):
            sizes[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")):
            sizes[name] = None if default is None else 2
    heads = SIZES["num_attention_heads"] if "kv_lora_rank" in fields else 2  # latent: every head has keys of its own
    fixed = {
        "use_cache": True,
        "is_decoder": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "num_key_value_heads": heads,
        "head_dim": SIZES["head_dim"],
    }
    sizes.update({name: value for name, value in fixed.items() if name in fields})
    inner = {**(getattr(kind, "sub_configs", None) or {}), **(getattr(kind, "sub_configs_defaults", None) or {})}
    for name, part in inner.items():
        if name in changes and changes[name] is None:
            continue
        named = getattr(part, "model_type", None)
        part = (
            CONFIG_MAPPING[named]
            if getattr(part, "config_class", part) is AutoConfig
            else getattr(part, "config_class", part)
        )
        if dataclasses.is_dataclass(part) and name in fields:
            sizes[name] = {**({"model_type": named} if named else {}), **_small(part, changes.get(name, {}))}
            changes = {key: value for key, value in changes.items() if key != name}
    return {**sizes, **changes}
