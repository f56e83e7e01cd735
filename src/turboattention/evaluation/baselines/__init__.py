"""KV cache methods, ours and others', with a common interface: `METHODS` by name, `parse_methods` for lists.

Example:
    >>> for method in parse_methods("fp16,kivi-4,turbo-4"):
    ...     cache = method.make_cache(model.config)  # transformers' `past_key_values`
    ...     # run the model with attn_implementation=method.attention, or its own
    ...     method.bits_per_element(cache)
"""

from __future__ import annotations

from .interface import CacheMethod
from .methods import METHODS, parse_methods

__all__ = ["METHODS", "CacheMethod", "parse_methods"]
