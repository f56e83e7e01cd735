"""What a `TurboCache` needs to know of a transformers config: the attention window of each layer."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...errors import UnsupportedError
from ..model_shape import by_layer, text_config

LARGEST_HEAD = 256

_DEPEND_ON_ALL = {
    "doge": "its masks follow from the values of all past tokens, which a TurboCache does not give back",
    "diffllama": "it changes values after the cache",
}


def layer_windows(config: Any) -> list[int | None]:
    """Per cache layer the number of tokens visible to a query, including its own; None for all.

    Raises:
        UnsupportedError: layers that need another kind of cache.
    """
    text = text_config(config)
    crossed = getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None)
    if getattr(config, "is_encoder_decoder", False) or crossed:
        raise UnsupportedError(
            "model_config: encoder-decoder models and cross-attention need a cache of their own kind"
        )
    if _somewhere(text, "kv_lora_rank"):
        raise UnsupportedError("model_config: multi-head latent attention (MLA) is not supported by a TurboCache")
    if (kind := getattr(text, "model_type", None)) in _DEPEND_ON_ALL:
        raise UnsupportedError(f"model_config: the architecture {kind!r} is not supported: {_DEPEND_ON_ALL[kind]}")
    for index, width in enumerate(by_layer(text, "head_dim")):
        if isinstance(width, int) and (width > LARGEST_HEAD or width % 8):
            raise UnsupportedError(
                f"model_config: expected a head_dim of up to {LARGEST_HEAD} in multiples of 8, got {width} in layer "
                f"{index}"
            )
    # In every release, transformers' own cache has the kind of state of each layer.
    layers = DynamicCache(config=text).layers
    if not layers:
        return [None] * int(text.num_hidden_layers)
    windows = []
    for index, layer in enumerate(layers):
        if type(layer).__name__ == "DummyLayer":
            windows.append(None)
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedError(
                f"model_config: layer {index} needs a {type(layer).__name__}; a TurboCache holds full and "
                "sliding-window attention layers only"
            )
        else:
            # For chunked attention this is the size of a chunk, which bounds how far back a query sees.
            windows.append(getattr(layer, "sliding_window", None))
    # A layer whose keys are read by later layers has to keep keys beyond its own window.
    return [None] * len(windows) if shares_keys(text) else windows


def _somewhere(config: Any, name: str) -> bool:
    """Whether a field is set, of all layers or of some: transformers raises for one that differs between layers."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        return any(by_layer(config, name))


def shares_keys(text: Any) -> bool:
    """Whether some layers attend to the keys of others."""
    return bool(getattr(text, "num_kv_shared_layers", None)) or "reuse" in (
        getattr(text, "kv_sharing_modes", None) or []
    )
