"""TurboAttention: attention for LLM inference that stays in integers, over a compressed KV cache.

The names below are imported when first used; `import turboattention` itself loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that has it; a name that stands for itself is a submodule.
_LAZY = {
    "turbo_attention": "api",
    "turbo_attention_with_kvcache": "api",
    "backends": "api",
    "explain": "api",
    "TurboConfig": "config",
    "KVCache": "api",  # not kv.cache: with it comes dispatch, which gives caches their fastest quantizer
    "sas": "softmax",
    "flashq": "flashq",
    "integrations": "integrations",
    "bundled": "bundled",
    "errors": "errors",
}

__all__ = [
    "KVCache",
    "TurboConfig",
    "__version__",
    "backends",
    "bundled",
    "errors",
    "explain",
    "flashq",
    "integrations",
    "sas",
    "turbo_attention",
    "turbo_attention_with_kvcache",
]

if TYPE_CHECKING:
    from . import bundled, errors, flashq, integrations
    from .api import backends, explain, turbo_attention, turbo_attention_with_kvcache
    from .config import TurboConfig
    from .kv.cache import KVCache
    from .softmax import sas


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    value = module if _LAZY[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
