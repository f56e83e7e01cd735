"""Checks that the prompt of `generate` continues the tokens that are already in a `TurboCache`.

`generate` passes only the new tokens of a prompt to the model, so the cache cannot compare the earlier ones itself.
`_prefill`, with which a `generate` begins, gets all of them, and `prepare_inputs_for_generation` before every forward
pass. Models that have their own of the latter are checked as well, but their generated tokens are not known.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationMixin

from ...errors import BackendError, InputError
from . import RELEASES
from .cache import TurboCache
from .layer import ALTERNATIVE

_in_prefill: ContextVar[bool] = ContextVar("in_prefill", default=False)
"""Whether a prompt is being fed, of which `_prefill` took note."""
_PREPARE, _PREFILL = "prepare_inputs_for_generation", "_prefill"


def check_release() -> None:
    """Raise BackendError for transformers 5.24 and later, whose models take `cache` instead of `past_key_values`: the
    prompts of `generate` would not be checked."""
    if "past_key_values" not in inspect.signature(getattr(GenerationMixin, _PREPARE)).parameters:
        raise BackendError(
            f"transformers: expected a release from {RELEASES}, got {transformers.__version__}, whose models do not "
            "take past_key_values"
        )


def follow() -> None:
    """Wrap two methods of `GenerationMixin` that pass the token ids of `generate` to a `TurboCache`. Idempotent."""
    if not hasattr(getattr(GenerationMixin, _PREPARE), "_turbo_original"):
        for name, wrap in ((_PREPARE, _prepare), (_PREFILL, _prefill)):
            original = getattr(GenerationMixin, name)
            wrapped = functools.wraps(original)(wrap(original))
            wrapped._turbo_original = original  # type: ignore[attr-defined]
            setattr(GenerationMixin, name, wrapped)


def unfollow() -> None:
    """Undo `follow`."""
    for name in (_PREPARE, _PREFILL):
        original = getattr(getattr(GenerationMixin, name), "_turbo_original", None)
        if original is not None:
            setattr(GenerationMixin, name, original)


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(
        self: Any, input_ids: Tensor, next_sequence_length: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        cache, begins = kwargs.get("past_key_values"), bool(kwargs.get("is_first_iteration"))
        if isinstance(cache, TurboCache) and kwargs.get("use_cache") is False:
            raise InputError(f"use_cache: expected True with a TurboCache, got False; {ALTERNATIVE}")
        if isinstance(cache, TurboCache) and begins and not _in_prefill.get() and next_sequence_length is None:
            # Assisted decoding begins without `_prefill`, and hands all of its ids to the model.
            cache.check_level()
            cache.ids.begin_assisted(input_ids, cache.get_seq_length())
        elif not _in_prefill.get():
            _follow(input_ids, kwargs, None, begins=begins)
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
        before = _in_prefill.set(True)
        try:
            return original(self, input_ids, generation_config, model_kwargs, is_first_iteration, **kwargs)
        finally:
            _in_prefill.reset(before)

    return prefill


def _follow(input_ids: Tensor, kwargs: dict[str, Any], generation_config: Any, begins: bool) -> None:
    """Pass the ids [B, L] to a `TurboCache`: of all tokens, or, if the mask has more positions, of the new ones."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, TurboCache):
        return
    if begins:
        cache.check_level()
    if kwargs.get("inputs_embeds") is not None:
        if begins:
            cache.ids.begin_unknown(cache.get_seq_length())
        return
    if not begins:
        cache.ids.follow(input_ids)
        return
    # `generate` leaves out a mask without padding, and keeps its length.
    positions = mask.shape[-1] if isinstance(mask, Tensor) else getattr(generation_config, "_mask_length", -1)
    whole = positions in (-1, input_ids.shape[1])
    (cache.ids.begin if whole else cache.ids.begin_behind)(input_ids, cache.get_seq_length())
