"""Where kernels run: Triton launches on the current device, which need not be that of the tensors."""

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
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_own_device(call: Callable[P, R]) -> Callable[P, R]:
    """`call` with the device of its first tensor current."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with guard(first.device):
            return call(*args, **kwargs)

    return guarded


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x in memory of its own on the device, without waiting for it: only from pinned memory does a copy not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device, copy=True)
