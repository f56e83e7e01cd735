"""TurboAttention: integer attention for LLM inference over a quantized KV cache.

The names below are imported when they are first used, so that `import turboattention` stays fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. A name mapped to itself is a submodule.
_LAZY = {
    "turbo_attention": "api",
    "turbo_attention_with_kvcache": "api",
    "backends": "api",
    "explain": "api",
    "TurboConfig": "config",
    "ChannelOrder": "kv.channel_order",
    "KVCache": "kv.cache",
    "Calibration": "calibration",
    "DecodeGraph": "impl.triton.graph",
    "paged": "paged",
    "sas": "softmax",
    "flashq": "flashq",
    "integrations": "integrations",
    "bundled": "bundled",
    "errors": "errors",
}

__all__ = [
    "Calibration",
    "ChannelOrder",
    "KVCache",
    "TurboConfig",
    "__version__",
    "backends",
    "bundled",
    "errors",
    "explain",
    "flashq",
    "integrations",
    "paged",
    "sas",
    "turbo_attention",
    "turbo_attention_with_kvcache",
]
if importlib.util.find_spec("triton") is not None:
    __all__ += ["DecodeGraph"]

if TYPE_CHECKING:
    from . import bundled, errors, flashq, integrations, paged
    from .api import backends, explain, turbo_attention, turbo_attention_with_kvcache
    from .calibration import Calibration
    from .config import TurboConfig
    from .impl.triton.graph import DecodeGraph
    from .kv.cache import KVCache
    from .kv.channel_order import ChannelOrder
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
