"""Device guards: Triton launches kernels on the current device, which may differ from the tensors' device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context manager that makes a GPU the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_own_device(call: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run `call` with the device of its first tensor argument as the current device."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with guard(first.device):
            return call(*args, **kwargs)

    return guarded
