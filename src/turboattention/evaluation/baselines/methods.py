"""The methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...config import TurboConfig
from ...errors import InputError
from .interface import CacheMethod

_TURBO_PAPER = "Kang et al., TurboAttention, arXiv 2412.08585"


@dataclass(frozen=True)
class OwnCache:
    """The model's own full-precision cache."""

    name: str = "fp16"
    title: str = "FP16 (own cache)"
    source: str = "transformers, DynamicCache"
    settings: str = "keys and values in the model's dtype"
    attention: str | None = None

    def unavailable(self) -> str | None:
        return None

    def make_cache(self, model_config: Any) -> Any:
        from ...integrations.transformers.baselines import own_cache

        return own_cache(model_config)

    def bits_per_element(self, cache: Any) -> float:
        return 8.0 * max((layer.keys.element_size() for layer in cache.layers if layer.is_initialized), default=2)


@dataclass(frozen=True)
class TurboMethod:
    """TurboAttention in one configuration. Needs ``turboattention.integrations.transformers.enable()``."""

    name: str
    title: str
    settings: str
    config: TurboConfig
    source: str = _TURBO_PAPER
    attention: str | None = "turbo"

    def unavailable(self) -> str | None:
        return None

    def make_cache(self, model_config: Any) -> Any:
        from ...integrations.transformers.cache import TurboCache

        return TurboCache(model_config, self.config)

    def bits_per_element(self, cache: Any) -> float:
        """Every byte allocated, as `TurboCache.bits_per_element` counts."""
        return cache.bits_per_element


def _turbo() -> list[CacheMethod]:
    methods: list[CacheMethod] = []
    for bits in (4, "mixed", 2):
        settings = "as published: tile scales, running max, min-max stage 2"
        name, title = f"turbo-paper-{bits}", f"TurboAttention {bits}, paper"
        methods.append(TurboMethod(name, title, settings, TurboConfig.paper(bits=bits)))
    for bits in (8, 4, 3, "mixed", 2):
        settings = "default: smoothing, rotation, token scales, 64 sink tokens at INT8, search; guard as set"
        methods.append(TurboMethod(f"turbo-{bits}", f"TurboAttention {bits}", settings, TurboConfig(bits=bits)))
    return methods


METHODS: dict[str, CacheMethod] = {method.name: method for method in [OwnCache(), *_turbo()]}
"""Every method by its name, in the order of tables."""


def parse_methods(text: str) -> list[CacheMethod]:
    """Methods from names separated by commas, in that order, each once; "all" is every one that can run here.

    Raises:
        InputError: no name, or one that there is not.
    """
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if names == ["all"]:
        return [method for method in METHODS.values() if method.unavailable() is None]
    for name in names or [""]:
        if name not in METHODS:
            raise InputError(f"methods: expected names from {', '.join(METHODS)}, or all; got {name or text!r}")
    return [METHODS[name] for name in names]
