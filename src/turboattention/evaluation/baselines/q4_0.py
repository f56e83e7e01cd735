"""Q4_0 after a Hadamard rotation, as users of ik_llama.cpp run it (``-ctk q4_0 -ctv q4_0 -khad -vhad``).

The channels of a head are rotated as a whole (head_dim 64, 128 or 256; other sizes stay as they are, as there), then
each 32 of them share one float16 scale, the value of largest magnitude over -8, and are rounded to -8 .. 7: ggml's
block_q4_0, 4.5 bits per element. No window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import UnsupportedError
from .hadamard import rotate_blocks
from .stream import FLOAT_BITS, Restored, as_half

BLOCK = 32


@dataclass(frozen=True)
class RotatedQ40:
    """Rotate, quantize each block of each token, and rotate back when read."""

    def settled(self, length: int) -> int:
        return length

    def __call__(self, x: Tensor, start: int) -> Restored:
        head_dim = x.shape[-1]
        if head_dim % BLOCK:
            raise UnsupportedError(f"head_dim: expected a multiple of Q4_0's block of {BLOCK}, got {head_dim}")
        order = head_dim if head_dim in (64, 128, 256) else 1
        values, bits = q4_0(rotate_blocks(x, order))
        return Restored(rotate_blocks(values, order), bits)


def q4_0(x: Tensor) -> Restored:
    """Blocks of 32 along the last dimension: ``code = floor(x / d + 8.5)``, at most 15, and back ``(code - 8) d``.

    Codes are taken against the exact scale, as in ggml, and restored with the stored one.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    codes = (blocks / scale.where(scale != 0, 1.0) + 8.5).floor().clamp(0, 15)
    values = (codes - 8) * as_half(scale)
    return Restored(values.flatten(-2), 4 * x.numel() + FLOAT_BITS * scale.numel())
