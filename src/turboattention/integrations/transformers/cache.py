"""`TurboCache`: transformers' `past_key_values`, quantized."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from ... import dispatch
from ...calibration import Calibration
from ...config import TurboConfig
from ...errors import ConfigError, InputError, UnsupportedError
from ...kv.channel_order import ChannelOrder
from ...validation import check_config
from ...words import number_of
from ..model_shape import ModelShape, text_config
from .known_ids import KnownIds, check_goes_on, checked_ids
from .layer import BESIDE_AN_ENCODER, TurboLayer
from .model import LayerKind, layer_kinds, may_cross, shares_keys
from .parallel import TensorParallel
from .states import (
    EmptyLayer,
    HybridLayer,
    StateUpdates,
    check_crop,
    copied,
    crop_states,
    reset_states,
    select_states,
    state_nbytes,
)


class TurboCache(Cache):
    """A quantized KV cache for models loaded with ``attn_implementation="turbo"``.

    Works wherever transformers takes a `Cache`: greedy and sampled decoding, beams,
    `num_return_sequences`, left-padded batches, assisted and prompt-lookup decoding, chunked
    prefill. Attention reads the packed cache; padding is not stored.

    In hybrid models, layers without attention are transformers' own (`LinearAttentionLayer` and others), as in a
    `DynamicCache`. Their states cannot go back to an earlier token if they are recurrent: `crop` then refuses.

    Under transformers' tensor parallelism, each process creates one with the same arguments, which stores the heads
    that the process computes: `head_bits`, `k_mean`, `k_order` and a `calibration` cover all heads of the model, and
    each process takes its part of them. Sizes such as `nbytes` are those of the process.

    Args:
        model_config: ``model.config``.
        config: `TurboConfig()` by default; with a `calibration`, ``bits="mixed"``.
        calibration: a `Calibration` of this model. With ``bits="mixed"``, its widths replace the paper's method; its
            means of K, if it was made with means, and with `reorder_k` its orders of K's channels are used at all
            widths.
        head_bits: widths per layer, each as `KVCache` takes them ([Hkv] or [2, Hkv]).
        k_mean: calibrated means of K per layer, each float [Hkv, D].
        k_order: calibrated orders of K's channels per layer (with `reorder_k`).
        max_tokens: tokens per sequence to reserve memory for; more may follow.
        exact_layers: indices of layers that INT8 cannot represent: their keys and values stay in the model's own dtype
            and its own attention reads them. They are added to those of a `calibration`.
            With ``guard="adapt"`` the guard adds such layers at a cache's first compressed block.
        backend: as in `turbo_attention_with_kvcache`.
        check_prompts: whether `generate` raises an error for a prompt that does not begin with the tokens in the cache.
            Only ids known from earlier calls of `generate` or from the cache's file are compared; a warning is issued
            once for tokens from direct calls of the model or from `inputs_embeds`. Saved in files.

    Raises:
        UnsupportedError: MLA, encoder-decoder models, models without attention.
        ConfigError, InputError: arguments out of range. BackendError: a backend that cannot run here.

    Example:
        >>> enable()
        >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="turbo")
        >>> model.generate(**inputs, past_key_values=TurboCache(model.config))
    """

    layers: list[Any]
    attention_layers: list[TurboLayer]

    def __new__(cls, model_config: Any = None, *_: Any, **__: Any) -> TurboCache:
        return object.__new__(cls.of_kind(getattr(model_config, "model_type", None)))

    def __init__(
        self,
        model_config: Any,
        config: TurboConfig | None = None,
        *,
        calibration: Calibration | None = None,
        head_bits: Sequence[Any] | Tensor | None = None,
        k_mean: Sequence[Tensor | None] | Tensor | None = None,
        k_order: Sequence[ChannelOrder | None] | None = None,
        max_tokens: int | None = None,
        exact_layers: Sequence[int] = (),
        backend: str = "auto",
        check_prompts: bool = True,
    ):
        if calibration is not None:
            config = config or TurboConfig(bits="mixed")
            given = {"head_bits": head_bits, "k_mean": k_mean, "k_order": k_order}
            head_bits, k_mean, k_order = _calibrated(calibration, model_config, config, given)
        check_config(config)
        dispatch.choose(backend)  # raises now, not in the middle of a first forward
        kinds = layer_kinds(model_config)
        exact = _checked_layers(exact_layers, kinds)
        if calibration is not None:
            exact |= set(calibration.exact_layers)
        per_layer = ((head_bits, "head_bits"), (k_mean, "k_mean"), (k_order, "k_order"))
        bits, means, orders = (_per_layer(values, name, len(kinds)) for values, name in per_layer)
        layers = [
            _new_layer(
                index,
                kind,
                config=config,
                head_bits=bits[index],
                k_mean=means[index],
                k_order=orders[index],
                max_tokens=max_tokens,
                model=ModelShape.of(model_config),
                parallel=TensorParallel.of(model_config),
                backend=backend,
                always_exact=index in exact,
            )
            for index, kind in enumerate(kinds)
        ]
        self._hold(layers)
        for layer in self.attention_layers:
            layer.may_stay_empty = shares_keys(text_config(model_config))
        self.ids = KnownIds(checked=check_prompts)
        self._may_cross = may_cross(text_config(model_config))

    @classmethod
    def of_kind(cls, model_type: str | None) -> type[TurboCache]:
        """The class for an architecture: MiniMax accepts only caches of its own class."""
        if cls is not TurboCache or model_type != "minimax":
            return cls
        from .minimax import MiniMaxTurboCache

        return MiniMaxTurboCache

    @classmethod
    def from_layers(cls, layers: list[Any], prompt_ids: Tensor | None = None, check_prompts: bool = True) -> TurboCache:
        """A cache of existing layers."""
        cache = object.__new__(cls)
        cache._hold(layers)
        cache.ids, cache._may_cross = KnownIds(prompt_ids, checked=check_prompts), False
        return cache

    def _hold(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        self.attention_layers = [layer for layer in layers if isinstance(layer, TurboLayer)]
        for place, layer in enumerate(self.attention_layers):
            layer.leads = place == 0
        self._updates = StateUpdates()

    @property
    def state_layers(self) -> list[tuple[int, LinearAttentionLayer]]:
        """Layers with states of linear attention, and their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionLayer)]

    def __repr__(self) -> str:
        return (
            f"TurboCache(layers={len(self.layers)}, batch_size={self.batch_size}, length={self.get_seq_length()}, "
            f"nbytes={self.nbytes})"
        )

    # -- transformers -------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns its arguments, with a handle for the attention function, which stores them."""
        if not 0 <= layer_idx < len(self.layers):
            raise InputError(
                f"past_key_values: expected a TurboCache made for this model, which has a layer {layer_idx}; "
                f"got one made for {number_of(len(self.layers), 'layer')}"
            )
        layer = self.layers[layer_idx]
        if not isinstance(layer, TurboLayer):
            raise InputError(
                f"past_key_values: expected no keys in layer {layer_idx}, which does not attend by the model's config"
            )
        if layer.leads:
            self.check_level()
        else:
            self.attention_layers[self.attention_layers.index(layer) - 1].check_settled()
        return layer.update(key_states, value_states, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self._updates.add("conv", layer_idx, state_idx, self.get_seq_length())
        return super().update_conv_state(conv_states, layer_idx, state_idx=state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._updates.add("recurrent", layer_idx, state_idx, self.get_seq_length())
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx=state_idx, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `i` what row `beam_idx[i]` was; compressed blocks are shared."""
        index = beam_idx.cpu()  # once, not in every layer
        for layer in self.attention_layers:
            layer.check_settled()
        for layer in self.layers:
            if isinstance(layer, TurboLayer):
                layer.reorder_cache(index)
            elif isinstance(layer, LinearAttentionLayer):
                select_states(layer, index)
        self.ids.select(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions; a positive number is the length to keep.

        Raises:
            InputError: a sliding window has released blocks that would be needed, or a forward pass that failed partway
                left states ahead of the cache. UnsupportedError: a recurrent state would have to return to an earlier
                token. The cache is unchanged then.
        """
        removed, lengths = int(tokens_to_remove), [layer.get_seq_length() for layer in self.attention_layers]
        kept = [max(removed if removed > 0 else length + removed, 0) for length in lengths]
        for layer, length in zip(self.attention_layers, kept, strict=True):
            layer.check_crop(length)
        gone = max(lengths) - min(max(kept), max(lengths))
        if gone and max(kept) and self.state_layers:
            self.check_level()
            self._updates.check_level(self.attention_layers[0].index, self.get_seq_length())
        for index, layer in self.state_layers:
            check_crop(index, layer, gone, max(lengths) - gone)
        for layer in self.layers:
            if isinstance(layer, TurboLayer):
                layer.crop(tokens_to_remove)
            elif isinstance(layer, LinearAttentionLayer):
                crop_states(layer, gone, max(lengths) - gone)
        if gone:
            self._updates.clear()
        self.ids.cut(self.get_seq_length())

    def reset(self) -> None:
        for layer in self.layers:
            if isinstance(layer, TurboLayer):
                layer.reset()
            elif isinstance(layer, LinearAttentionLayer):
                reset_states(layer)
        self._updates.clear()
        self.ids.clear()

    @property
    def batch_size(self) -> int:
        """-1 before the first forward."""
        return max((layer.batch_size for layer in self.attention_layers), default=-1)

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(x, LinearAttentionLayer) and not isinstance(x, HybridLayer) for x in self.layers]

    @property
    def is_dummy(self) -> list[bool]:
        return [isinstance(x, EmptyLayer) for x in self.layers]

    @property
    def is_compileable(self) -> bool:
        return False

    def check_level(self) -> None:
        """Raises unless all layers have the same length, i.e. if an earlier forward call was interrupted."""
        layers = self.attention_layers
        lengths = {layer.get_seq_length() for layer in layers if layer.is_initialized or not layer.may_stay_empty}
        for layer in layers:
            layer.check_settled()
        outside = [index for index, layer in self.state_layers if max(lengths) and not state_nbytes(layer)]
        if outside:
            raise UnsupportedError(
                f"past_key_values: expected states in the TurboCache, got none in layer {outside[0]}: an earlier "
                "forward failed halfway, or the architecture keeps them elsewhere and is not supported. reset() "
                "empties the cache"
            )
        if len(lengths) > 1:
            back = self._level_before()
            crossed = f", or the decoder attends to an encoder: pass {BESIDE_AN_ENCODER}" if self._may_cross else ""
            raise InputError(
                f"past_key_values: expected layers of equal length, got {sorted(lengths)}: an earlier forward failed "
                f"halfway{crossed}. {f'crop({back}) goes back to before it, ' if back else ''}"
                "reset() empties the cache"
            )

    def _level_before(self) -> int:
        """The length to which a crop can undo a forward pass that failed partway; 0 if no crop can."""
        least = min(layer.get_seq_length() for layer in self.attention_layers)
        try:
            for layer in self.attention_layers:
                layer.check_crop(least)
        except InputError:  # a sliding window has released what it would need
            return 0
        return 0 if self.state_layers else least

    # -- what it holds --------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """All bytes allocated for keys and values, over all attention layers. States are in `state_nbytes`."""
        return sum(layer.nbytes for layer in self.attention_layers)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the states of linear attention, convolutions and the like, which are not quantized."""
        return sum(state_nbytes(layer) for _, layer in self.state_layers)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens would take at 16 bits: 2 * tokens * Hkv * (D + Dv), summed over layers.

        Sliding layers count the tokens inside their window, as transformers' own cache keeps them.
        """
        return sum(layer.fp16_nbytes for layer in self.attention_layers)

    @property
    def exact_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are kept in the model's own dtype: named, calibrated, or found by the guard."""
        return tuple(layer.index for layer in self.attention_layers if layer.exact)

    @property
    def bits_per_element(self) -> float:
        """`nbytes * 8` over the elements held; infinite while empty."""
        return self.nbytes * 16 / self.fp16_nbytes if self.fp16_nbytes else float("inf")

    @property
    def seq_lens(self) -> Tensor:
        """int64 [B]: tokens of each sequence, without padding."""
        layer = next((layer for layer in self.attention_layers if layer.batch_size >= 0), None)
        return torch.zeros(0, dtype=torch.int64) if layer is None else layer.seq_lens

    # -- copies and files -------------------------------------------------------------------------------

    def clone(self) -> TurboCache:
        """An independent cache with the same content; compressed blocks are shared. `copy.copy` and `copy.deepcopy` do
        this."""
        other = type(self).from_layers([_copied(layer) for layer in self.layers])
        other.ids, other._updates, other._may_cross = self.ids.copy(), self._updates.copy(), self._may_cross
        return other

    def __copy__(self) -> TurboCache:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboCache:
        return self.clone()

    def save(self, path: str | os.PathLike[str], input_ids: Tensor | None = None) -> None:
        """Write the whole cache to one safetensors file; under tensor parallelism each process writes its heads, to
        `path` with the suffix ``.rank0of2`` and so on.

        Args:
            input_ids: ids of the tokens in the cache, integers [B, L] with L the length of the cache, padding included;
                stored as `prompt_ids`. By default `known_ids`, the ids that the cache received from `generate` or its
                file, if they are complete. After
                ``output = model.generate(...)`` these are ``output[:, : cache.get_seq_length()]``: the last token was
                never stored.

        Raises:
            InputError: `input_ids` are not as many tokens as the cache holds, or it holds none.
        """
        from .serialization import save_cache

        save_cache(self, path, input_ids)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model_config: Any = None,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> TurboCache:
        """Read what `save` wrote, for a prompt that begins with the same tokens. Under tensor parallelism, each process
        reads the part that the process of its rank, out of equally many, saved to the same `path`; this needs
        `model_config`.

        Args:
            model_config: ``model.config``, to check now that the file is this model's; the first
                forward checks it in any case.

        Raises:
            FormatError: the file is damaged, not of this format, or of another version.
            InputError: the file is of another model or of other heads.
        """
        from .serialization import load_cache

        return load_cache(cls, path, model_config, device, backend)

    @property
    def prompt_ids(self) -> Tensor | None:
        """int64 [B, L]: ids of the tokens that were loaded from a file and are still held; None if not known.

        Can be set to the ids of all tokens in the cache, for example after direct calls of the model, so that
        `generate` compares a prompt with them. Raises InputError for other shapes or dtypes."""
        return None if self.ids.saved is None else self.ids.saved.clone()

    @prompt_ids.setter
    def prompt_ids(self, value: Tensor | None) -> None:
        known = None if value is None else checked_ids(value, self.batch_size, self.get_seq_length()).clone()
        self.ids.saved = self.ids.fed = known

    @property
    def check_prompts(self) -> bool:
        """Whether `generate` raises an error for a prompt that does not begin with the cache's tokens."""
        return self.ids.checked

    @check_prompts.setter
    def check_prompts(self, value: bool) -> None:
        self.ids.checked = value

    @property
    def known_ids(self) -> Tensor | None:
        """The ids [B, L] of all tokens that the cache holds, from `generate` or from its file; None if some are not
        known."""
        ids = self.ids.all_of(self.get_seq_length())
        return None if ids is None else ids.clone()

    def check_prompt(self, input_ids: Tensor) -> int:
        """Check that the prompt `input_ids` [B, L] begins with all tokens of the cache and is longer, and return their
        number.

        Pass the whole prompt to `generate`, but only the rest of it to the model itself.

        Raises:
            InputError: the prompt does not begin with the cache's tokens or has no further token, or the ids of some
                cached tokens are not known.
        """
        if self.prompt_ids is None:
            raise InputError("prompt_ids: expected a cache saved with input_ids, got one saved without")
        check_goes_on(input_ids, self.prompt_ids, self.get_seq_length())
        return self.get_seq_length()


def _calibrated(
    calibration: Any, model_config: Any, config: TurboConfig, given: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Widths, means and orders per layer, if `config` uses them; `given`: the user's, by name."""
    if not isinstance(calibration, Calibration):
        raise ConfigError(f"calibration: expected a Calibration, got {type(calibration).__name__}")
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}: expected None with a calibration, which has its own, got a value")
    check_config(config)
    calibration.check_shape(asdict(ModelShape.of(model_config)))
    return (
        calibration.head_bits if config.bits == "mixed" else None,
        calibration.k_mean if config.smooth_k else None,
        calibration.k_order if config.reorder_k else None,
    )


def _new_layer(index: int, kind: LayerKind, **options: Any) -> Any:
    if not kind.attends:
        return kind.other
    if kind.other is not None:
        return HybridLayer(index, kind.window, number_of_states=kind.other.number_of_states, **options)
    return TurboLayer(index, kind.window, **options)


def _copied(layer: Any) -> Any:
    if isinstance(layer, TurboLayer):
        return layer.clone()
    return copied(layer) if isinstance(layer, LinearAttentionLayer) else layer  # others hold nothing


def _checked_layers(indices: Any, kinds: list[LayerKind]) -> set[int]:
    valid = isinstance(indices, (Sequence, set, frozenset)) and not isinstance(indices, str)
    known = [index for index, kind in enumerate(kinds) if kind.attends]
    if not valid or not all(type(i) is int and i in known for i in indices):
        which = f"from 0 to {len(kinds) - 1}" if len(known) == len(kinds) else f"that attend, {known}"
        raise ConfigError(f"exact_layers: expected indices of layers {which}, got {indices!r}")
    return set(indices)


def _per_layer(values: Any, name: str, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if not isinstance(values, (Sequence, Tensor)) or len(values) != count:
        got = len(values) if isinstance(values, (Sequence, Tensor)) else type(values).__name__
        raise ConfigError(f"{name}: expected one entry per layer ({count}), got {got}")
    return list(values)
