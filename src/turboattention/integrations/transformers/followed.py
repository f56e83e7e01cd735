"""Checks that the prompt of `generate` continues the tokens that are already in a `TurboCache`.

`generate` passes only the new tokens of a prompt to the model, so the cache cannot compare the earlier ones itself.
`prepare_inputs_for_generation`, which runs before every forward pass, gets all of them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from ...errors import InputError
from .cache import TurboCache
from .layer import ALTERNATIVE

_NAME = "prepare_inputs_for_generation"


def follow() -> None:
    """Wrap `prepare_inputs_for_generation`, so that a `TurboCache` learns the token ids of `generate`. Idempotent."""
    original = getattr(GenerationMixin, _NAME)
    if hasattr(original, "_turbo_original"):
        return

    @functools.wraps(original)
    def prepare(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, TurboCache) and kwargs.get("use_cache") is False:
            raise InputError(f"use_cache: expected True with a TurboCache, got False; {ALTERNATIVE}")
        if isinstance(cache, TurboCache) and kwargs.get("inputs_embeds") is None:
            whole = not isinstance(mask, Tensor) or mask.shape[-1] == input_ids.shape[1]
            cache.follow(input_ids if whole else None, begins=bool(kwargs.get("is_first_iteration")))
        return original(self, input_ids, *args, **kwargs)

    prepare._turbo_original = original  # type: ignore[attr-defined]
    setattr(GenerationMixin, _NAME, prepare)


def unfollow() -> None:
    """Undo `follow`."""
    original = getattr(getattr(GenerationMixin, _NAME), "_turbo_original", None)
    if original is not None:
        setattr(GenerationMixin, _NAME, original)
