"""SAW-INT4 (Jia et al., arXiv 2604.19157): token-wise INT4 after a block-diagonal Hadamard rotation (BDR).

Each token of each head: rotate blocks of channels, then asymmetric min-max INT4. The authors' default rotates keys
only, with blocks of 128 (of head_dim if that is smaller); values may be rotated too. No window, no signs.
Assumed: scale and zero are 16 bits each, which gives the published 4.25 bits at head_dim 128.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .groups import min_max
from .hadamard import rotate_blocks
from .stream import Restored


@dataclass(frozen=True)
class RotatedPerToken:
    """Rotate, quantize each token over its head_dim values, and rotate back when read."""

    bits: int = 4
    order: int = 128

    def settled(self, length: int) -> int:
        return length

    def __call__(self, x: Tensor, start: int) -> Restored:
        values, bits = min_max(rotate_blocks(x, self.order), self.bits, -1)
        return Restored(rotate_blocks(values, self.order), bits)
