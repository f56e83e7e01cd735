"""Checks that the prompt of `generate` continues the tokens that are already in a `TurboCache`.

`generate` passes only the new tokens of a prompt to the model, so the cache cannot compare the earlier ones itself.
`prepare_inputs_for_generation`, which runs before every forward pass, gets all of them; except with
`prefill_chunk_size`, where it gets a piece of the prompt, and `_prefill` all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from ...errors import InputError
from .cache import TurboCache
from .layer import ALTERNATIVE

_in_pieces: ContextVar[bool] = ContextVar("in_pieces", default=False)
"""Whether a prompt is being fed in pieces."""
_PREPARE, _PREFILL = "prepare_inputs_for_generation", "_prefill"


def follow() -> None:
    """Wrap two methods of `GenerationMixin`, so that a `TurboCache` learns the token ids of `generate`. Idempotent."""
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
    def prepare(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, TurboCache) and kwargs.get("use_cache") is False:
            raise InputError(f"use_cache: expected True with a TurboCache, got False; {ALTERNATIVE}")
        if isinstance(cache, TurboCache) and not _in_pieces.get():
            cache.follow(_whole(input_ids, kwargs), begins=bool(kwargs.get("is_first_iteration")))
        return original(self, input_ids, *args, **kwargs)

    return prepare


def _prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    def prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        pieces = generation_config.prefill_chunk_size is not None
        if isinstance(cache, TurboCache) and pieces:
            cache.follow(_whole(input_ids, model_kwargs), begins=True)
        before = _in_pieces.set(pieces)
        try:
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            _in_pieces.reset(before)

    return prefill


def _whole(input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The ids [B, L] of all tokens, or None if only those of new ones are known: the mask then has more positions."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("inputs_embeds") is not None or (isinstance(mask, Tensor) and mask.shape[-1] != input_ids.shape[1]):
        return None
    return input_ids
