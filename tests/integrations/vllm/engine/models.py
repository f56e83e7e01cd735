"""Small models in folders, and their answers through transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboattention import TurboConfig, bundled
from turboattention.calibration import Calibration

from .answers import Answer

MODEL = Path(bundled.__file__).parent / "model"

_SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Of the models with random weights; their words are those of the bundled model's tokenizer."""


def save_window(folder: Path, window: int = 70) -> Path:
    """The bundled weights with every layer looking back `window` tokens: what Mistral is to Llama."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_gemma(folder: Path, head_dim: int = 64) -> Path:
    """Random weights; softcapped logits, and layers that see all tokens and a window in turn."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **_SIZES,
        intermediate_size=256,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        attn_logit_softcapping=5.0,
        sliding_window=70,
        initializer_range=0.1,
    )
    model = Gemma2ForCausalLM(config)
    # Small embeddings leave the word to the layers; a large last norm parts the logits again.
    model.model.embed_tokens.weight.data.mul_(0.2)
    model.model.norm.weight.data.fill_(20.0)
    return save(model, folder)


def save_gpt_oss(folder: Path, sinks: Sequence[float] = (-2.0, 0.0, 2.0, 4.0)) -> Path:
    """Random weights; learned sinks (of the four heads of each layer), layers that see a window and all tokens in turn,
    and experts, all of which compute every token: a choice of some would be another where rounding differs."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        **_SIZES,
        intermediate_size=128,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=4,
        sliding_window=70,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 512,
        },
        initializer_range=0.07,
    )
    model = GptOssForCausalLM(config)
    model.model.embed_tokens.weight.data.mul_(0.5)
    model.model.norm.weight.data.fill_(5.0)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.copy_(torch.tensor(sinks))
    return save(model, folder)


HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "FalconH1",
        {
            "intermediate_size": 256,
            "head_dim": 64,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 64,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "hidden_size": 256,
            "intermediate_size": 128,
            "shared_intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "attention_multiplier": 0.125,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention", "mlp"],
            "intermediate_size": 256,
            "head_dim": 64,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
    ),
}
"""By model type: the name in transformers, and sizes of models that mix attention with recurrent layers. Every expert
computes every token, as in `save_gpt_oss`."""

IN_BFLOAT16 = ("qwen3_next",)
"""Those whose recurrent layers vLLM computes in bfloat16 only, on CPUs."""


def save_hybrid(folder: Path, kind: str) -> Path:
    """Random weights; recurrent layers, whose states vLLM keeps beside the pages."""
    import transformers

    name, changes = HYBRIDS[kind]
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**_SIZES, **changes}.items() if value is not None}
    config = transformers.AutoConfig.for_model(kind, **sizes, initializer_range=0.07)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.get_input_embeddings().weight.data.mul_(0.5)
    (norm,) = (getattr(model.model, x) for x in ("norm", "norm_f", "final_layernorm") if hasattr(model.model, x))
    norm.weight.data.fill_(5.0)
    return save(model, folder)


def save(model: Any, folder: Path) -> Path:
    """With the bundled model's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def save_changed(folder: Path, name: str, change: Callable[[Tensor], object]) -> Path:
    """The bundled model with one parameter changed in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA adapter of the bundled model with random weights, for all projections of attention and of the MLP."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    torch.manual_seed(seed)
    names = [name for name in load_file(MODEL / "model.safetensors") if name.endswith("_proj.weight")]
    shapes = {name: load_file(MODEL / "model.safetensors")[name].shape for name in names}
    parts: dict[str, Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        base = f"base_model.model.{name.removesuffix('.weight')}"
        parts[f"{base}.lora_A.weight"] = torch.randn(rank, inputs) * inputs**-0.5
        parts[f"{base}.lora_B.weight"] = torch.randn(outputs, rank) * 0.5
    save_file(parts, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in names})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def save_merged(folder: Path, adapter: Path) -> Path:
    """The bundled model with an adapter's products added to its weights, in float32."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    parts = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        base = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{base}.lora_A.weight" in parts:
            weights[name] = weights[name].float() + parts[f"{base}.lora_B.weight"] @ parts[f"{base}.lora_A.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_eagle_head(folder: Path) -> Path:
    """The configuration of a head that drafts from the bundled model's hidden states: one layer of its shape, for which
    vLLM draws weights."""
    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_mimo(folder: Path) -> Path:
    """The bundled weights as a model with one MTP layer, for which vLLM draws weights: Qwen2's layers, with biases of
    zero."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="qwen2", architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    biases = {
        name.replace("weight", "bias"): weight.new_zeros(len(weight))
        for name, weight in weights.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    save_file(weights | biases, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    """In float32, for `attn_implementation="turbo"`, and without an end."""
    from transformers import AutoModelForCausalLM

    from turboattention.integrations.transformers import enable

    enable()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="turbo", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def transformers_answer(
    model: Any,
    prompt: dict[str, list[int]],
    config: TurboConfig,
    max_tokens: int = 40,
    calibration: Calibration | None = None,
) -> Answer:
    """Greedy, through `generate()` and a `TurboCache`."""
    from turboattention.integrations.transformers import TurboCache

    ids = torch.tensor([prompt["prompt_token_ids"]])
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=TurboCache(model.config, config, calibration=calibration),
        max_new_tokens=max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].log_softmax(-1).topk(2).values.tolist() for logits in result.logits]
    return Answer(tuple(result.sequences[0, ids.shape[1] :].tolist()), tuple(a - b for a, b in best))
