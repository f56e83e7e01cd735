"""The quantizers of `turboattention.evaluation.baselines` as transformers caches (`past_key_values`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer

from ...errors import BackendError, UnsupportedError
from ...integrations.transformers.model import layer_windows
from ..baselines.stream import FLOAT_BITS, Quantizer, Stream


class BaselineLayer(DynamicLayer):
    """A growing cache in which older tokens are replaced by their quantized and dequantized values.

    The tokens of a call attend to each other at the model's precision, as published for prefill and for the window
    of decoding; they are quantized afterwards. Padding is stored like any token.

    `keys` and `values` are views of preallocated memory, and the tensors returned by `update` are quantized in place
    by the next call, so that a decode step copies only its own token.
    """

    def __init__(self, keys: Quantizer, values: Quantizer):
        super().__init__()
        self.streams = Stream(keys), Stream(values)
        self._memory: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def settle(self) -> None:
        """Quantize the tokens that have left the window."""
        for stream, x in zip(self.streams, (self.keys, self.values), strict=True):
            if x is not None and x.numel():
                stream.settle(x)

    def _append(self, at: int, held: Tensor | None, new: Tensor) -> Tensor:
        batch, heads, count, head_dim = new.shape
        length = held.shape[2] if held is not None and held.numel() else 0
        total, memory = length + count, self._memory[at]
        # After a crop the tensors are still views of this memory; after a beam reorder or a selection they are not.
        moved = memory is None or (held is not None and length and held.data_ptr() != memory.data_ptr())
        if memory is None or moved or memory.shape[:2] != (batch, heads) or memory.shape[2] < total:
            memory = self._memory[at] = new.new_empty(batch, heads, total + total // 4, head_dim)
            if held is not None and length:
                memory[:, :, :length] = held
        memory[:, :, length:total] = new
        return memory[:, :, :total]

    def crop(self, tokens_to_remove: int) -> None:
        self.settle()
        super().crop(tokens_to_remove)
        for stream in self.streams:
            stream.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self._memory = [None, None]
        for stream in self.streams:
            stream.crop(0)

    @property
    def elements(self) -> int:
        """Number of elements of keys and values."""
        return sum(x.numel() for x in (self.keys, self.values) if x is not None)

    @property
    def stored_bits(self) -> float:
        """Bits of codes, scales, zeros, factors and windows."""
        self.settle()
        held = zip(self.streams, (self.keys, self.values), strict=True)
        return sum(stream.stored_bits(x) for stream, x in held if x is not None)


class BaselineCache(Cache):
    """One `BaselineLayer` per layer. Sliding-window layers keep every token; their masks apply the window.

    Args:
        keys, values: a quantizer for all layers, or one for each.

    Raises:
        UnsupportedError: models that need another kind of cache.
    """

    layers: list[BaselineLayer]

    def __init__(
        self, model_config: Any, keys: Quantizer | Sequence[Quantizer], values: Quantizer | Sequence[Quantizer]
    ):
        count = len(layer_windows(model_config))
        of_layers = (each if isinstance(each, Sequence) else [each] * count for each in (keys, values))
        layers = [BaselineLayer(*pair) for pair in zip(*of_layers, strict=True)]
        super().__init__(layers=layers)  # type: ignore[arg-type]

    @property
    def bits_per_element(self) -> float:
        """Bits stored over elements held; infinite while empty."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.stored_bits for layer in self.layers) / elements if elements else float("inf")


def own_cache(model_config: Any) -> DynamicCache:
    """The model's own cache."""
    return DynamicCache(config=model_config)


def quantized_cache(model_config: Any, backend: str, **settings: int) -> QuantizedCache:
    """transformers' `QuantizedCache`.

    Raises:
        UnsupportedError: the model has layers that `QuantizedCache` does not support.
        BackendError: the backend is installed but does not run.
    """
    if any(window is not None for window in layer_windows(model_config)):
        raise UnsupportedError("model_config: transformers' QuantizedCache has no sliding-window layers")
    try:
        return QuantizedCache(backend, model_config, **settings)
    except ImportError as error:
        raise BackendError(f"--methods: transformers' {backend} cache cannot run here: {error}") from error


def quantized_cache_bits(cache: QuantizedCache) -> float:
    """Bits per element of a `QuantizedCache`, from the tensors in its layers, with floats counted as float16."""
    bits, elements = 0, 0
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if not layer.get_seq_length():
            continue
        keys, values = layer._quantized_keys, layer._quantized_values
        bits += sum(_bits(part) for part in (keys, values, layer.keys, layer.values))
        batch, heads, _, head_dim = layer._dequantize(keys).shape
        elements += 2 * batch * heads * layer.get_seq_length() * head_dim
    return bits / elements if elements else float("inf")


def _bits(part: Any) -> int:
    """Bits of a tensor, of the tensors inside a tensor subclass, or of a container of these."""
    if isinstance(part, dict):
        return sum(_bits(value) for value in part.values())
    if isinstance(part, (tuple, list)):
        return sum(_bits(value) for value in part)
    if not isinstance(part, Tensor):
        return 0
    flatten = getattr(part, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(_bits(getattr(part, name)) for name in flatten()[0])
    width = 8 * part.element_size()
    return part.numel() * (min(width, FLOAT_BITS) if part.is_floating_point() else width)
