"""Copies from the host to a device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy of x (on the CPU, or there already) on the device. To a GPU it is made through pinned memory, since the
    host waits for a copy from memory that may be paged out, and for all work before it."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device, copy=True)
    return x.pin_memory().to(device, non_blocking=True)
