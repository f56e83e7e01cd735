"""The rotation of Q, K and V before quantization: signs, then block Hadamard (numerics.md, presets).

It is orthogonal, so `rotate(q) . rotate(k) = q . k`, and spreads outlier channels over their block. The block size is
the largest power of two that divides head_dim. The signs are fixed: channel `c` is negated if bit `c mod 64` of
`_SIGN_BITS` is set.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..uploads import upload

ROTATION_ID = 1
"""Identifies the rotation in saved caches; must change with the signs or blocks."""

_SIGN_BITS = 0x9E3779B97F4A7C15  # the golden ratio's first 64 bits


def rotation_matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix R [D, D], D = head_dim, of the given dtype: row vectors are rotated by `x @ R` and back by
    `x @ R.T`."""
    return (_signed_hadamard(head_dim, device) * _norm(head_dim)).to(dtype)


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last dimension of `x` [..., D] (float32 or float64), or undo the rotation. Shape and dtype stay.

    Sums in float64, where sums of float32 values are exact unless these differ by a factor above 2^20: the order of
    summation in a matrix product depends on the number of rows, and a row's result must not.
    """
    head_dim = x.shape[-1]
    matrix = _signed_hadamard(head_dim, x.device)
    return ((x.double() @ (matrix.T if inverse else matrix)) * _norm(head_dim)).to(x.dtype)


@functools.lru_cache(maxsize=32)
def _signed_hadamard(head_dim: int, device: torch.device) -> Tensor:
    """Signs times blocks of the Hadamard matrix: float64 [D, D] of -1, 0 and 1."""
    block = head_dim & -head_dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    signs = torch.tensor([1.0 - 2.0 * (_SIGN_BITS >> (c % 64) & 1) for c in range(head_dim)], dtype=torch.float64)
    return upload(signs[:, None] * torch.block_diag(*[hadamard] * (head_dim // block)), device)


def _norm(head_dim: int) -> float:
    return (head_dim & -head_dim) ** -0.5
