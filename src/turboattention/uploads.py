"""Asynchronous copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; x itself if it is there already. A copy to a GPU uses pinned memory: for a copy from pageable
    memory, the host would wait for it and for all earlier work."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
