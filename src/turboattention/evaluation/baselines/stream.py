"""The stored form of one tensor, K or V, of one layer in a baseline: when tokens are quantized, and their bits.

Storage is simulated: tokens are replaced by their dequantized values as floats, and the bits are counted as they would
be stored.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FLOAT_BITS = 16
"""Bits of an element in a full-precision window, and of every scale, zero, norm and factor, also in float32 models."""


class Restored(NamedTuple):
    """The dequantized values of x [B, H, T, D], of the same shape, and the number of bits that all of them take."""

    values: Tensor
    bits: int


class Quantizer(Protocol):
    """The quantizer of one method."""

    def settled(self, length: int) -> int:
        """How many of the first tokens are quantized at a length of `length`; the others form the window."""
        ...

    def __call__(self, x: Tensor, start: int) -> Restored:
        """Quantize float32 x [B, H, T, D], the tokens from position `start` on, in one group."""
        ...


def as_half(x: Tensor) -> Tensor:
    """x rounded to float16, in which scales, zeros, norms and factors are stored."""
    return x.half().to(x.dtype)


class Stream:
    """Quantizes a growing tensor as its quantizer requires. No token is quantized twice."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer = quantizer
        self._done = 0
        self._bits = 0.0  # of one sequence: batches are repeated and selected

    @torch.inference_mode()
    def settle(self, x: Tensor) -> None:
        """Replace the tokens of x [B, H, T, D] that have left the window by their dequantized values, in place."""
        start, end = self._done, self.quantizer.settled(x.shape[2])
        if end <= start:
            return
        values, bits = self.quantizer(x[:, :, start:end].float(), start)
        self._done = end
        self._bits += bits / x.shape[0]
        x[:, :, start:end] = values.to(x.dtype)

    def stored_bits(self, x: Tensor) -> float:
        """Stored bits of x [B, H, T, D], after `settle`."""
        batch, heads, length, head_dim = x.shape
        return batch * (self._bits + FLOAT_BITS * heads * (length - self._done) * head_dim)

    def crop(self, length: int) -> None:
        """Remove the tokens from `length` on. The remaining quantized tokens are counted at the average size."""
        if length < self._done:
            self._bits *= length / self._done
            self._done = length
