"""The modes that this package computes in, whatever the caller's are.

Caches outlive the mode they were filled in: what they keep is made outside of `torch.inference_mode`.

Tensors made inside of it can never be changed in place outside, where `generate`, which runs under `no_grad`,
goes on with the same cache. Under autocast PyTorch would round what is computed here to 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_own_modes(function: F) -> F:
    """A function that computes, makes or changes what a cache keeps: under `inference_mode` it runs under `no_grad`
    instead, and never under autocast."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        cast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        inference = torch.is_inference_mode_enabled()
        if not cast and not inference:
            return function(*args, **kwargs)
        with ExitStack() as modes:
            if inference:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for device in cast:
                modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
