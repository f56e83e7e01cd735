"""States of layers without attention (linear attention, convolutions, state-space models): transformers' own layers
hold them, and a `TurboCache` copies, selects, crops and saves them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ...errors import FormatError, InputError, UnsupportedError
from ...validation import check_finite
from ...words import number_of
from .layer import TurboLayer
from .views import own_memory

CONV, RECURRENT = "conv_states", "recurrent_states"


class EmptyLayer:
    """A layer with neither keys nor states, such as an MLP: transformers' `DummyLayer`, which came after 5.16."""

    supports_early_init = False
    is_initialized = is_compileable = is_croppable = True
    keys = values = None


class HybridLayer(TurboLayer, LinearAttentionLayer):
    """A layer with both attention and states, like transformers' `LinearAttentionAndFullAttentionLayer`."""

    def __init__(self, index: int, window: int | None = None, *, number_of_states: int = 1, **options: Any):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        TurboLayer.__init__(self, index, window, **options)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come as two arguments, states by name."""
        (TurboLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:
        return not recurrent(self) and self.record_past

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        crop_states(self, before - self.get_seq_length(), self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        select_states(self, beam_idx)

    def reset(self) -> None:
        super().reset()
        reset_states(self)

    def clone(self) -> Any:
        return _own_states(super().clone())


class StateUpdates:
    """The length of the cache at which each state was last written, by (name, layer, number). A state advances once per
    forward pass."""

    def __init__(self, lengths: dict[tuple[str, int, int], int] | None = None):
        self._lengths = lengths or {}

    def add(self, name: str, layer: int, number: int, length: int) -> None:
        """Record a write.

        Raises:
            InputError: it is the second at this length: the previous forward pass failed before an attention layer, and
                the state is ahead.
        """
        key = name, layer, number
        if self._lengths.get(key) == length:
            raise _ahead(layer, length)
        self._lengths[key] = length

    def check_level(self, attends: int, length: int) -> None:
        """Raises `InputError` if the states of a layer before `attends`, the first attention layer, are ahead of the
        cache's tokens after a forward pass that failed partway."""
        for (_, layer, _), updated_at in self._lengths.items():
            if layer < attends and updated_at == length:
                raise _ahead(layer, length)

    def copy(self) -> StateUpdates:
        return StateUpdates(dict(self._lengths))

    def clear(self) -> None:
        self._lengths.clear()


def _ahead(layer: int, length: int) -> InputError:
    return InputError(
        f"past_key_values: expected states of {number_of(length, 'token')} in layer {layer}, got some that are ahead: "
        "an earlier forward failed halfway. reset() empties the cache"
    )


def recurrent(layer: LinearAttentionLayer) -> bool:
    """Whether it has a state that cannot return to an earlier token."""
    return any(layer.is_recurrent_states_initialized.values())


def state_nbytes(layer: LinearAttentionLayer) -> int:
    return sum(x.nbytes for _, _, x in _tensors(layer))


def select_states(layer: LinearAttentionLayer, index: Tensor) -> None:
    """Sequences `index`, int64 [B']."""
    for name, number, x in list(_tensors(layer)):
        getattr(layer, name)[number] = x.index_select(0, index.to(x.device))


def copied(layer: LinearAttentionLayer) -> LinearAttentionLayer:
    """A copy that shares no memory, because states are written in place."""
    return _own_states(copy.copy(layer))


def reset_states(layer: LinearAttentionLayer) -> None:
    """Reset to the state before the first token, for any number of sequences."""
    fresh = vars(LinearAttentionLayer(number_of_states=layer.number_of_states))
    vars(layer).update({name: value for name, value in fresh.items() if isinstance(value, dict)})


def check_crop(index: int, layer: LinearAttentionLayer, removed: int, kept: int) -> None:
    """Raises `UnsupportedError` if the states of `kept` positions are no longer available."""
    if not removed or not kept:
        return
    if recurrent(layer):
        raise UnsupportedError(
            f"crop: layer {index} has a recurrent state, which cannot go back to earlier tokens; keep a clone() of "
            "the cache from before them, or reset() it"
        )
    for number, x in layer.conv_states.items():
        if x is None:
            continue
        kernel = _kernel(layer, number)
        if not layer.record_past or x.shape[-1] < removed + min(kernel, kept):
            raise UnsupportedError(
                f"crop: layer {index} keeps the last {kernel} inputs of a convolution; it keeps more from "
                "activate_past_recording() until the next crop"
            )


def crop_states(layer: LinearAttentionLayer, removed: int, kept: int) -> None:
    """Remove the last `removed` positions and the inputs recorded for a crop; checked by `check_crop`."""
    if removed and not kept:
        reset_states(layer)
        return
    if layer.record_past:
        for number, x in layer.conv_states.items():
            if x is not None:
                end = x.shape[-1] - removed
                layer.conv_states[number] = own_memory(x[..., max(end - _kernel(layer, number), 0) : end])


def _kernel(layer: LinearAttentionLayer, number: int) -> int:
    """Inputs that a convolution's next step needs."""
    kernel = layer.conv_kernel_size[number]
    assert kernel is not None
    return kernel


def state_entry(layer: LinearAttentionLayer, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON value and tensors to save."""
    tensors = {f"{prefix}{name}{number}": _saved(layer, name, number, x) for name, number, x in _tensors(layer)}
    counts = [layer.conv_kernel_size[number] for number in range(layer.number_of_states)]
    previous = [bool(layer.has_previous_state[number]) for number in range(layer.number_of_states)]
    held = [[name, number] for name, number, _ in _tensors(layer)]
    return {"kernels": counts, "previous": previous, "held": held}, tensors


def load_states(
    layer: LinearAttentionLayer, entry: dict[str, Any], tensors: dict[str, Tensor], prefix: str, batch: int, device: Any
) -> None:
    """Restore in a new `layer` the states that `state_entry` saved for `batch` sequences.

    Raises:
        FormatError, NonFiniteError: damaged tensors.
    """
    for number, (kernel, previous) in enumerate(zip(entry["kernels"], entry["previous"], strict=True)):
        layer.conv_kernel_size[number], layer.has_previous_state[number] = kernel, bool(previous)
    for name, number in entry["held"]:
        key = f"{prefix}{name}{number}"
        x = tensors[key].to(device)
        kernel = layer.conv_kernel_size[number] if name == CONV else x.shape[-1]
        if not x.is_floating_point() or x.shape[-1] != kernel or len(x) != batch:
            raise FormatError(
                f"{key}: expected floats of {number_of(batch, 'sequence')}, got {x.dtype} {tuple(x.shape)}"
            )
        check_finite(key, x)
        {CONV: layer.conv_states, RECURRENT: layer.recurrent_states}[name][number] = x
        getattr(layer, f"is_{name}_initialized")[number] = True
        if name == CONV:
            layer.dtype, layer.device = x.dtype, x.device


def _tensors(layer: LinearAttentionLayer) -> Iterator[tuple[str, int, Tensor]]:
    for name in (CONV, RECURRENT):
        for number, x in getattr(layer, name).items():
            if x is not None:
                yield name, number, x


def _saved(layer: LinearAttentionLayer, name: str, number: int, x: Tensor) -> Tensor:
    """Without the inputs recorded for a crop."""
    if name == CONV and layer.record_past:
        kernel = _kernel(layer, number)
        x = torch.nn.functional.pad(x, (max(kernel - x.shape[-1], 0), 0))[..., -kernel:]
    return x.contiguous()


def _own_states(layer: Any) -> Any:
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            own = {number: x.clone() if isinstance(x, Tensor) else x for number, x in value.items()}
            setattr(layer, name, own)
    return layer
