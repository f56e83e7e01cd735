"""A view keeps the whole underlying tensor alive, so a cache stores copies of the parts it needs."""

from __future__ import annotations

import torch
from torch import Tensor

_WASTE = 16


def own_memory(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if 1 / 16 or more of its memory is outside the view."""
    spare = x.untyped_storage().nbytes() - x.nbytes
    return x.clone(memory_format=torch.contiguous_format) if spare * _WASTE > x.nbytes else x
