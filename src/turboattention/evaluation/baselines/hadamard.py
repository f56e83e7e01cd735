"""Block Hadamard rotation of head_dim, as SAW-INT4 and KVarN use it: no signs, orthonormal, its own inverse."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_blocks(x: Tensor, order: int) -> Tensor:
    """x [..., D] times the block-diagonal matrix of Hadamard blocks of `order`, or of the largest power of two that
    divides D where that is smaller. Applied again it gives x back."""
    order = min(order, x.shape[-1] & -x.shape[-1])
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.unflatten(-1, (-1, order)) @ (matrix * order**-0.5)).flatten(-2)
