"""The sizes that identify a model's architecture. Shared by the integrations; imports none of their libraries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """The sizes by which a saved cache or a calibration is matched to a model; None where the config has no value."""

    model_type: str
    num_hidden_layers: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    hidden_size: int | None
    vocab_size: int | None

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape from a transformers config, or from the text config inside one."""
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
        """Raises `InputError` that names the difference if `config` is another model's."""
        other = asdict(ModelShape.of(config))
        for name, expected in asdict(self).items():
            if other[name] != expected:
                raise InputError(
                    f"past_key_values: expected a TurboCache made for this model ({name}={other[name]!r}), "
                    f"got one made for {name}={expected!r}"
                )


def text_config(config: Any) -> Any:
    """The text decoder's part of a transformers config.

    Raises:
        InputError: `config` is not a transformers config.
    """
    if not hasattr(config, "get_text_config"):
        raise InputError(f"model_config: expected a transformers config (model.config), got {type(config).__name__}")
    return config.get_text_config(decoder=True)


def by_layer(config: Any, name: str) -> list[Any]:
    """A field of every layer's config, in models that have a config per layer; else empty."""
    return [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", None) or ()]


def _number(config: Any, name: str) -> int | None:
    """An integer field; None if it is missing or differs between layers."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # raised by transformers for a field that each layer has its own value of
        values = set(by_layer(config, name))
        value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
