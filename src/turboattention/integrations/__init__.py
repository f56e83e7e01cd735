"""Integrations with serving and modelling libraries. Each is imported, with its library, at first use."""

from __future__ import annotations

import importlib
from types import ModuleType

_NAMES = ("transformers", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name in _NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
