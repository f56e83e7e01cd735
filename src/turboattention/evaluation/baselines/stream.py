"""How a baseline keeps one tensor, K or V, of one layer: what is quantized when, and the bits of it.

Storage is simulated: what a quantizer restores is held as floats in place of the original, and its bits are counted
as they would be stored.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FLOAT_BITS = 16
"""Of an element in a full-precision window, and of every scale, zero, norm and factor; in a float32 model too."""


class Restored(NamedTuple):
    """What a quantizer gives back of x [B, H, T, D]: the same shape, and the bits that all of it takes in storage."""

    values: Tensor
    bits: int


class Quantizer(Protocol):
    """One paper's way to store a tensor."""

    def settled(self, length: int) -> int:
        """How many of the first tokens are stored quantized once there are `length`; the others form a window."""
        ...

    def __call__(self, x: Tensor, start: int) -> Restored:
        """Quantize float32 x [B, H, T, D], the tokens from position `start` on, at once."""
        ...


def as_half(x: Tensor) -> Tensor:
    """x rounded to float16, in which scales, zeros, norms and factors are stored."""
    return x.half().to(x.dtype)


class Stream:
    """Follows a growing tensor and quantizes what its quantizer says is due. Nothing is quantized twice."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer = quantizer
        self._done = 0
        self._bits = 0.0  # of one sequence: batches are repeated and selected

    @torch.inference_mode()
    def settle(self, x: Tensor) -> None:
        """Tokens of x [B, H, T, D] that are due now are replaced by what is restored of them, in place."""
        start, end = self._done, self.quantizer.settled(x.shape[2])
        if end <= start:
            return
        values, bits = self.quantizer(x[:, :, start:end].float(), start)
        self._done = end
        self._bits += bits / x.shape[0]
        x[:, :, start:end] = values.to(x.dtype)

    def stored_bits(self, x: Tensor) -> float:
        """Bits of all of x [B, H, T, D], which is settled."""
        batch, heads, length, head_dim = x.shape
        return batch * (self._bits + FLOAT_BITS * heads * (length - self._done) * head_dim)

    def crop(self, length: int) -> None:
        """Tokens from `length` on are gone; quantized ones that stay are counted at their average."""
        if length < self._done:
            self._bits *= length / self._done
            self._done = length
