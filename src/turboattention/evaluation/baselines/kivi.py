"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys per channel, values per token, a recent window in float16.

Section 3.2 and algorithm 1; the published settings are group G = 32 and residual R = 128.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .groups import min_max_along
from .stream import Restored


@dataclass(frozen=True)
class KiviKeys:
    """Groups of G consecutive tokens of one channel. R tokens are quantized together when they are complete; the
    last ``length mod R`` stay in float16."""

    bits: int
    group: int = 32
    residual: int = 128

    def settled(self, length: int) -> int:
        return length - length % self.residual

    def __call__(self, x: Tensor, start: int) -> Restored:
        return min_max_along(x, self.bits, 2, self.group)


@dataclass(frozen=True)
class KiviValues:
    """Groups of G channels of one token. The last R tokens stay in float16."""

    bits: int
    group: int = 32
    residual: int = 128

    def settled(self, length: int) -> int:
        return max(length - self.residual, 0)

    def __call__(self, x: Tensor, start: int) -> Restored:
        return min_max_along(x, self.bits, 3, self.group)
