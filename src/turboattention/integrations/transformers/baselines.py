"""Baselines of `turboattention.evaluation` as transformers' `past_key_values`."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache


def own_cache(model_config: Any) -> DynamicCache:
    """The model's own cache."""
    return DynamicCache(config=model_config)
