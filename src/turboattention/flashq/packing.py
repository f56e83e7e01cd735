"""Codes to bytes and back: planes of 4, 2 and 1 bits (8 bits are one byte each).

A run of `n` codes and a plane of `w` bits give `m = n w / 8` bytes; byte `j` holds the codes
`j, j + m, j + 2m, ...`, the first in the lowest bits. So the codes that one byte line holds are
lines themselves: a vector unit unpacks with a shift and a mask, never a shuffle. Five and three bits are
a plane of the lower four or two, then a plane of the highest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError

PLANES = {8: (8,), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Width of a code -> widths of its planes, lowest bits first."""


def pack_codes(code: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> bytes uint8 [..., n * bits / 8]. `n` is a multiple of 8."""
    if code.shape[-1] % 8:
        raise ShapeError(f"code: expected a multiple of 8 codes in the last dimension, got {code.shape[-1]}")
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((code >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(planes, -1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [..., n * bits / 8] -> uint8 [..., n]."""
    count = packed.shape[-1] * 8 // bits
    code, start, shift = None, 0, 0
    for width in PLANES[bits]:
        size = count * width // 8
        plane = _unpack_plane(packed[..., start : start + size], width)
        code = plane if code is None else code | (plane << shift)
        start, shift = start + size, shift + width
    assert code is not None
    return code


def _pack_plane(code: Tensor, width: int) -> Tensor:
    parts = code.unflatten(-1, (8 // width, -1))
    out = parts[..., 0, :].clone()
    for k in range(1, 8 // width):
        out |= parts[..., k, :] << (k * width)
    return out


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    if width == 8:
        return packed
    return torch.cat([(packed >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], -1)
