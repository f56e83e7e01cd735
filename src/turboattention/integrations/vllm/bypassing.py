"""Models whose attention layers have caches of their own in vLLM 0.32.0. They never ask for this plugin's backend, so
they would be served without quantization, and without a word. Rejected by the name of their architecture."""

from __future__ import annotations

from typing import Any

EVERYWHERE = ("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration", "DeepseekV41ForCausalLM")
ON_GPUS = (
    "InklingForCausalLM",
    "InklingForConditionalGeneration",
    "MiniMaxM3SparseForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
    "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration",
)
WITH_STORED_SINKS = ("OpenPanguVLForConditionalGeneration", "PanguProMoEV2ForCausalLM", "PanguUltraMoEForCausalLM")
"""On GPUs, if the config has `param_sink_number`."""

BYPASSING = (*EVERYWHERE, *ON_GPUS, *WITH_STORED_SINKS)


def refuse_bypassing(config: Any) -> None:
    """Raises `UnsupportedError` that names the architecture if this plugin's cache was asked for: always on CPUs, with
    `--attention-backend CUSTOM` on GPUs. config: a VllmConfig."""
    from .refusals import refuse  # imports vLLM's configuration, which the entry point has no need of

    model, name = config.model_config, config.model_config.architecture
    if config.device_config.device_type == "cpu":
        bypasses = name in EVERYWHERE
    else:
        sinks = name in WITH_STORED_SINKS and getattr(model.hf_text_config, "param_sink_number", 0)
        asked = getattr(config.attention_config.backend, "name", None) == "CUSTOM"
        bypasses = asked and (name in EVERYWHERE or name in ON_GPUS or sinks)
    if bypasses:
        refuse(f"the architecture {name} (its attention layers have caches of their own, which would not be quantized)")


def check_models() -> None:
    """Have vLLM call `refuse_bypassing` when it checks the configuration of such a model. Idempotent."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for name in BYPASSING:
        own = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not hasattr(own, "refuses_bypassing"):
            MODELS_CONFIG_MAP[name] = _checking(own)


def _checking(own: Any) -> Any:
    class Checking(own):
        """vLLM's checks of a model, after this plugin's."""

        refuses_bypassing = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            refuse_bypassing(vllm_config)
            super().verify_and_update_config(vllm_config)

    return Checking
