"""Checks that the prompt of `generate` continues the tokens that are already in a `TurboCache`.

`generate` passes only the new tokens of a prompt to the model, so the cache cannot compare the earlier ones itself.
`_prefill` or `_assisted_decoding`, with which a `generate` begins, get all of them, and
`prepare_inputs_for_generation` before every forward pass. Models that have their own of the latter are checked as well,
but their generated tokens are not known. After an error in `generate`, the ids of tokens that were not stored are
dropped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationMixin

from ...errors import BackendError, InputError, UnsupportedError
from ..model_shape import text_config
from . import RELEASES
from .cache import TurboCache
from .layer import ALTERNATIVE

_begun: ContextVar[str | None] = ContextVar("begun", default=None)
"""The method of `GenerationMixin` that took note of the prompt of the `generate` that is running."""
_PREPARE, _PREFILL, _ASSISTED = "prepare_inputs_for_generation", "_prefill", "_assisted_decoding"


def check_release() -> None:
    """Raise BackendError for transformers 5.24 and later, whose models take `cache` instead of `past_key_values`: the
    prompts of `generate` would not be checked."""
    if "past_key_values" not in inspect.signature(getattr(GenerationMixin, _PREPARE)).parameters:
        raise BackendError(
            f"transformers: expected a release from {RELEASES}, got {transformers.__version__}, whose models do not "
            "take past_key_values"
        )


def follow() -> None:
    """Wrap the methods of `GenerationMixin` that pass the token ids of `generate` to a `TurboCache`. Idempotent."""
    if not hasattr(getattr(GenerationMixin, _PREPARE), "_turbo_original"):
        for name, wrap in _WRAPS.items():
            original = getattr(GenerationMixin, name)
            wrapped = functools.wraps(original)(wrap(original))
            wrapped._turbo_original = original  # type: ignore[attr-defined]
            setattr(GenerationMixin, name, wrapped)


def unfollow() -> None:
    """Undo `follow`."""
    for name in _WRAPS:
        original = getattr(getattr(GenerationMixin, name), "_turbo_original", None)
        if original is not None:
            setattr(GenerationMixin, name, original)


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            if isinstance(cache, TurboCache):
                cache.ids.cut(cache.get_seq_length())
            raise

    return generate


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(
        self: Any, input_ids: Tensor, next_sequence_length: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        begun = _begun.get()
        if isinstance(kwargs.get("past_key_values"), TurboCache) and kwargs.get("use_cache") is False:
            raise InputError(f"use_cache: expected True with a TurboCache, got False; {ALTERNATIVE}")
        if begun != _PREFILL:
            _follow(input_ids, kwargs, None, begins=begun is None and bool(kwargs.get("is_first_iteration")))
        return original(self, input_ids, next_sequence_length, *args, **kwargs)

    return prepare


def _prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    def prefill(
        self: Any,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **kwargs: Any,
    ) -> Any:
        _follow(input_ids, model_kwargs, generation_config, begins=is_first_iteration)
        with _begun_by(_PREFILL):
            return original(self, input_ids, generation_config, model_kwargs, is_first_iteration, **kwargs)

    return prefill


def _assisted(original: Callable[..., Any]) -> Callable[..., Any]:
    def assisted(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        _refuse_drafts(self.config, kwargs.get("past_key_values"))
        _follow(input_ids, kwargs, kwargs.get("generation_config"), begins=True, assisted=True)
        with _begun_by(_ASSISTED):
            return original(self, input_ids, *args, **kwargs)

    return assisted


_WRAPS = {"generate": _generate, _PREPARE: _prepare, _PREFILL: _prefill, _ASSISTED: _assisted}


@contextmanager
def _begun_by(name: str) -> Iterator[None]:
    before = _begun.set(name)
    try:
        yield
    finally:
        _begun.reset(before)


def _refuse_drafts(config: Any, cache: Any) -> None:
    """Raises `UnsupportedError` if a layer has states that cannot return to the token before a rejected draft: all
    but those of convolutions. For most such models, transformers has raised an error already."""
    kinds = getattr(text_config(config), "layer_types", None) or ()
    for index, layer in cache.state_layers if isinstance(cache, TurboCache) else ():
        kind = kinds[index] if index < len(kinds) else type(layer).__name__
        if kind != "conv":
            raise UnsupportedError(
                f"prompt_lookup_num_tokens, assistant_model: expected a model that can return to earlier tokens, got "
                f"one with a recurrent state in layer {index} ({kind}); generate without drafts"
            )


def _follow(
    input_ids: Tensor, kwargs: dict[str, Any], generation_config: Any, begins: bool, assisted: bool = False
) -> None:
    """Pass the ids [B, L] to a `TurboCache`: of all tokens, or, if the mask has more positions, of the new ones."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, TurboCache):
        return
    length = cache.get_seq_length()
    if begins:
        cache.check_level()
    if kwargs.get("inputs_embeds") is not None:
        if begins:
            cache.ids.begin_unknown(length)
        return
    if not begins:
        cache.ids.follow(input_ids)
        return
    if length and cache.batch_size != len(input_ids):  # the model refuses another batch
        return
    # `generate` leaves out a mask without padding, and keeps its length.
    positions = mask.shape[-1] if isinstance(mask, Tensor) else getattr(generation_config, "_mask_length", -1)
    given = input_ids.shape[1]
    positions = given if positions == -1 else positions
    if assisted:
        cache.ids.begin_assisted(input_ids, length, positions)
    elif positions == given:
        cache.ids.begin(input_ids, length)
    else:
        cache.ids.begin_behind(input_ids, length, positions)
