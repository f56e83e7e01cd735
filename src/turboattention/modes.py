"""Caches outlive the mode they were filled in: what they keep is made outside of `torch.inference_mode`.

Tensors made inside of it can never be changed in place outside, where `generate`, which runs under `no_grad`,
goes on with the same cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def keeps_tensors(function: F) -> F:
    """A function that makes or changes what a cache keeps: under `inference_mode` it runs under `no_grad` instead."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
