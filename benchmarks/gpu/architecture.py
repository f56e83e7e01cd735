"""Architectures whose properties are others than those shipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from turboattention.kernels.triton import configs


@contextlib.contextmanager
def changed(**properties: bool) -> Iterator[None]:
    """Within, launches are for the device's architecture with these properties."""
    own = configs.architecture_of

    def other(device: torch.device) -> configs.Architecture:
        return replace(own(device), **properties)

    configs.architecture_of = other  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.architecture_of = own
