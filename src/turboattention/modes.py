"""Makes this package independent of the caller's inference and autocast modes.

Tensors created under `torch.inference_mode` cannot be modified in place outside it. A cache may be filled there and
used later under `no_grad`, for example by `generate`, so its tensors are created outside inference mode. Autocast
would round intermediate results to 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_own_modes(function: F) -> F:
    """Decorator: run a function under `no_grad` instead of `inference_mode`, and without autocast."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        inference = torch.is_inference_mode_enabled()
        if not inference and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        with ExitStack() as modes:
            if inference:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
