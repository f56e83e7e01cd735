"""Properties of a transformers config that a `TurboCache` depends on: the kind of each layer, and its window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...errors import UnsupportedError
from ...validation import MAX_HEAD_DIM
from ..model_shape import by_layer, text_config
from .guarded_mask import COMPUTES_BESIDE
from .layer import BESIDE_AN_ENCODER
from .states import EmptyLayer

_UNSUPPORTED = {
    "blt": "its encoder and its decoder have a cache each",
    "diffllama": "it changes values after the cache",
    "doge": "its masks depend on the values of all past tokens, which a TurboCache does not return",
    "mllama_text_model": "some of its layers keep an image's keys in the same cache",
    "prophetnet": "it computes attention by itself",
    "recurrent_gemma": "it keeps states in its modules, beside the cache",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it attends to the keys of the model that it assists"
    ),
    **dict.fromkeys(
        ("openai-gpt", "reformer", "rwkv", "xlm", "xlnet", "xlstm"),
        "its forward does not take past_key_values",
    ),
}
"""By architecture, why it is refused."""


@dataclass(frozen=True)
class LayerKind:
    """attends: whether the layer has keys and values, which the `TurboCache` stores. window: tokens visible to a query,
    including its own; None for all. other: transformers' layer for all other states; None if there are none."""

    attends: bool
    window: int | None = None
    other: Any = None


def layer_windows(config: Any) -> list[int | None]:
    """`LayerKind.window` of models in which every layer attends.

    Raises:
        UnsupportedError: other models.
    """
    kinds = layer_kinds(config)
    for index, kind in enumerate(kinds):
        if kind.other is not None:
            raise UnsupportedError(
                f"model: expected one in which every layer attends and does nothing else, got one whose layer {index} "
                f"has a {type(kind.other).__name__}"
            )
    return [kind.window for kind in kinds]


def layer_kinds(config: Any) -> list[LayerKind]:
    """The kind of each layer of a model's cache.

    Raises:
        UnsupportedError: layers that need another kind of cache.
    """
    text = text_config(config)
    for kind in (getattr(x, "model_type", None) for x in (config, text)):
        if kind in _UNSUPPORTED:
            raise UnsupportedError(f"model_config: the architecture {kind!r} is not supported: {_UNSUPPORTED[kind]}")
    crossed = getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None)
    if getattr(config, "is_encoder_decoder", False) or crossed:
        raise UnsupportedError(
            "model_config: expected a decoder, got a model with an encoder or with cross-attention layers. Decoders "
            f"alone (AutoModelForCausalLM) that attend to an encoder's output take {BESIDE_AN_ENCODER}"
        )
    if _somewhere(text, "kv_lora_rank"):
        raise UnsupportedError(_latent_attention(text.model_type))
    for name in ("head_dim", "v_head_dim"):
        for index, width in enumerate(by_layer(text, name)):
            if isinstance(width, int) and (width > MAX_HEAD_DIM or width % 8):
                raise UnsupportedError(
                    f"model_config: expected a {name} of up to {MAX_HEAD_DIM} in multiples of 8, got {width} in layer "
                    f"{index}"
                )
    # In every release, transformers' own cache has the kind of state of each layer.
    layers = DynamicCache(config=text).layers
    if not layers:
        return [LayerKind(True)] * int(text.num_hidden_layers)
    # A layer whose keys are read by later layers has to keep keys beyond its own window.
    shared = shares_keys(text)
    empty = [kind in ("moe", "mlp") for kind in getattr(text, "layer_types", None) or [""] * len(layers)]
    kinds = [
        LayerKind(False, other=EmptyLayer()) if empty[index] else _kind(index, layer, shared)
        for index, layer in enumerate(layers)
    ]
    if not any(kind.attends for kind in kinds):
        raise UnsupportedError("model_config: expected a model with attention layers, got one without")
    return kinds


def _latent_attention(kind: str) -> str:
    """Why models that cache latents are refused, and what works instead."""
    instead = "leave past_key_values out to attend in INT8 over them"
    if kind in COMPUTES_BESIDE:
        instead = 'load it with attn_implementation="eager" and leave past_key_values out'
    return (
        f"model_config: expected a model that caches keys and values, got the architecture {kind!r}, whose multi-head "
        "latent attention (MLA) caches compressed latents, which are smaller than quantized keys and values of all "
        f"heads; {instead}"
    )


def _kind(index: int, layer: Any, shared: bool) -> LayerKind:
    # For chunked attention this is the size of a chunk, which bounds how far back a query sees.
    window = None if shared else getattr(layer, "sliding_window", None)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return LayerKind(True, window)
    name = type(layer).__name__
    if name == "DummyLayer" and shared:  # it reads the keys of another layer
        return LayerKind(True)
    if type(layer).__module__ == DynamicCache.__module__ and isinstance(getattr(layer, "conv_states", None), dict):
        if name == "LinearAttentionLayer":
            return LayerKind(False, other=layer)
        if name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"):
            return LayerKind(True, window, layer)
    raise UnsupportedError(
        f"model_config: layer {index} needs a {name}; a TurboCache holds full and sliding-window attention layers, and "
        "linear attention beside them"
    )


def _somewhere(config: Any, name: str) -> bool:
    """Whether a field is set, of all layers or of some: transformers raises for one that differs between layers."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        return any(by_layer(config, name))


def may_cross(text: Any) -> bool:
    """Whether a decoder may attend to an encoder's output, as in Bart."""
    return any(name.startswith("encoder_") for name in vars(text))


def shares_keys(text: Any) -> bool:
    """Whether some layers attend to the keys of others."""
    return bool(getattr(text, "num_kv_shared_layers", None)) or "reuse" in (
        getattr(text, "kv_sharing_modes", None) or []
    )
