"""Plain INT8 and INT4: one scale and one minimum per token and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .groups import min_max
from .stream import Restored


@dataclass(frozen=True)
class PerToken:
    """Min-max over the head_dim values of a token, float16 scale and min: bits + 32 / D per element. No window."""

    bits: int

    def settled(self, length: int) -> int:
        return length

    def __call__(self, x: Tensor, start: int) -> Restored:
        return min_max(x, self.bits, -1)
