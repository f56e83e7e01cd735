"""A cubic compander near the Lloyd-Max quantizer of a normal distribution, as in ExLlamaV3's quantized cache.

Each 32 channels of a token are rotated by a Hadamard matrix, which brings them near a normal distribution, and divided
by their largest magnitude, stored in float16. What is left, in [-1, 1], goes through the inverse of

    f(t) = a t + (1 - a) t^3,  a = 0.65

and is rounded to the middles of 2^bits equal steps in t: levels are denser near zero. bits + 0.5 per element, no
window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .hadamard import rotate_blocks
from .stream import FLOAT_BITS, Restored, as_half

GROUP = 32
SLOPE = 0.65


@dataclass(frozen=True)
class Compander:
    bits: int

    def settled(self, length: int) -> int:
        return length

    def __call__(self, x: Tensor, start: int) -> Restored:
        if x.shape[-1] % GROUP:
            raise UnsupportedError(f"head_dim: expected a multiple of the group of {GROUP}, got {x.shape[-1]}")
        groups = rotate_blocks(x, GROUP).unflatten(-1, (-1, GROUP))
        largest = groups.abs().amax(-1, keepdim=True)
        levels, borders = (each.to(x) for each in grid(self.bits))
        codes = torch.bucketize((groups / largest.where(largest > 0, 1.0)).contiguous(), borders, right=True)
        values = (levels[codes] * as_half(largest)).flatten(-2)
        return Restored(rotate_blocks(values, GROUP), self.bits * x.numel() + FLOAT_BITS * largest.numel())


def grid(bits: int) -> tuple[Tensor, Tensor]:
    """float64: the 2^bits levels, ascending, and the borders between them."""
    steps = torch.arange(2**bits, dtype=torch.float64)
    return curve((2 * steps + 1) / 2**bits - 1), curve(2 * steps[1:] / 2**bits - 1)


def curve(t: Tensor) -> Tensor:
    return SLOPE * t + (1 - SLOPE) * t**3
