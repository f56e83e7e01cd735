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
        if isinstance(kwargs.get("past_key_values"), TurboCache) and kwargs.get("use_cache") is False:
            raise InputError(f"use_cache: expected True with a TurboCache, got False; {ALTERNATIVE}")
        if not _in_pieces.get():
            _follow(input_ids, kwargs, begins=bool(kwargs.get("is_first_iteration")))
        return original(self, input_ids, *args, **kwargs)

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
        pieces = generation_config.prefill_chunk_size is not None
        if pieces:
            _follow(input_ids, model_kwargs, begins=is_first_iteration)
        before = _in_pieces.set(pieces)
        try:
            return original(self, input_ids, generation_config, model_kwargs, is_first_iteration, **kwargs)
        finally:
            _in_pieces.reset(before)

    return prefill


def _follow(input_ids: Tensor, kwargs: dict[str, Any], begins: bool) -> None:
    """Tell a `TurboCache` the ids [B, L] of all tokens, or None if those are only the new ones: the mask then has more
    positions."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if isinstance(cache, TurboCache) and kwargs.get("inputs_embeds") is None:
        whole = not isinstance(mask, Tensor) or mask.shape[-1] == input_ids.shape[1]
        cache.follow(input_ids if whole else None, begins)
