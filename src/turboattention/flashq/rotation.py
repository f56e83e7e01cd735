"""The rotation of Q, K and V before quantizing: signs, then block Hadamard (numerics.md, presets).

Orthogonal, so `rotate(q) . rotate(k) = q . k`; it spreads outlier channels over their block. Blocks
are the largest power of two that divides head_dim. The signs are fixed: bit `c` of the identity
number below, read as a 64-bit pattern repeated over the channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROTATION_ID = 1
"""Written into every saved cache. A change of signs or blocks is another number."""

_SIGN_BITS = 0x9E3779B97F4A7C15  # the golden ratio's first 64 bits


@functools.lru_cache(maxsize=32)
def rotation_matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal [D, D]: row vectors are rotated by `x @ R` and back by `x @ R.T`."""
    block = head_dim & -head_dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    matrix = torch.block_diag(*[hadamard * block**-0.5] * (head_dim // block))
    signs = torch.tensor([1.0 - 2.0 * (_SIGN_BITS >> (c % 64) & 1) for c in range(head_dim)], dtype=torch.float64)
    return (signs[:, None] * matrix).to(device, dtype)


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last dimension of `x` (float32 or float64), or undo it."""
    matrix = rotation_matrix(x.shape[-1], x.dtype, x.device)
    return x @ (matrix.T if inverse else matrix)
