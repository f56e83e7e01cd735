"""What a `TurboCache` must know of a model: its layers' windows, and enough to recognize it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...errors import InputError, UnsupportedError

LARGEST_HEAD = 256


@dataclass(frozen=True)
class ModelShape:
    """The sizes by which a cache and a model are matched; None where a config does not say."""

    model_type: str
    num_hidden_layers: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    hidden_size: int | None
    vocab_size: int | None

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        text = text_config(config)
        heads, hidden = (_number(text, name) for name in ("num_attention_heads", "hidden_size"))
        head_dim = _number(text, "head_dim") or (hidden // heads if hidden and heads else None)
        return cls(
            model_type=str(getattr(text, "model_type", "")),
            num_hidden_layers=_number(text, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_number(text, "num_key_value_heads") or heads,
            head_dim=head_dim,
            hidden_size=hidden,
            vocab_size=_number(text, "vocab_size"),
        )

    def check(self, config: Any) -> None:
        """Raises `InputError` naming what differs if `config` is another model's."""
        other = asdict(ModelShape.of(config))
        for name, expected in asdict(self).items():
            if other[name] != expected:
                raise InputError(
                    f"past_key_values: expected a TurboCache made for this model ({name}={other[name]!r}), "
                    f"got one made for {name}={expected!r}"
                )


_DEPEND_ON_ALL = {
    "doge": "its masks follow from the values of all past tokens, which a TurboCache does not give back",
    "diffllama": "it changes values after the cache",
}


def text_config(config: Any) -> Any:
    """The decoder's part of a config."""
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"model_config: expected a transformers config (model.config), got {type(config).__name__}")
    return config.get_text_config(decoder=True)


def layer_windows(config: Any) -> list[int | None]:
    """Per cache layer the tokens that its queries see, themselves included; None for all of them.

    Raises:
        UnsupportedError: layers that a quantized key/value cache cannot stand in for.
    """
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        raise UnsupportedError(
            "model_config: encoder-decoder models and cross-attention need a cache of their own kind"
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError("model_config: multi-head latent attention (MLA) is not supported by a TurboCache")
    if (kind := getattr(text, "model_type", None)) in _DEPEND_ON_ALL:
        raise UnsupportedError(f"model_config: the architecture {kind!r} is not supported: {_DEPEND_ON_ALL[kind]}")
    for index, width in enumerate(_by_layer(text, "head_dim")):
        if isinstance(width, int) and (width > LARGEST_HEAD or width % 8):
            raise UnsupportedError(
                f"model_config: expected a head_dim of up to {LARGEST_HEAD} in multiples of 8, got {width} in layer "
                f"{index}"
            )
    # transformers' own cache knows which kind of state each layer keeps, in every release.
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
            # Chunked attention has its chunk's size here: its queries see no further back than that.
            windows.append(getattr(layer, "sliding_window", None))
    # A layer whose keys later layers read again must keep what its own window no longer needs.
    return [None] * len(windows) if shares_keys(text) else windows


def shares_keys(text: Any) -> bool:
    """Whether some layers attend to the keys of others."""
    return bool(getattr(text, "num_kv_shared_layers", None)) or "reuse" in (
        getattr(text, "kv_sharing_modes", None) or []
    )


def _by_layer(config: Any, name: str) -> list[Any]:
    """A field of every layer's config, in models that have one for each; else empty."""
    return [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", None) or ()]


def _number(config: Any, name: str) -> int | None:
    """None also where layers differ."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers: ambiguous, as it is a field of each layer
        values = set(_by_layer(config, name))
        value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
