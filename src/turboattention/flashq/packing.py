"""Packs codes into planes of 8, 4, 2 and 1 bits.

A plane of `w` bits of `n` codes has `m = n w / 8` bytes; byte `j` holds codes `j, j + m, j + 2m, ...`, the first in the
lowest bits. A vector load of consecutive bytes thus unpacks to vectors of consecutive codes, with a shift and a mask
and without a shuffle. 5 and 3 bits are a plane of the lower 4 or 2 bits followed by a plane of the highest bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError

PLANES = {8: (8,), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Width of a code -> widths of its planes, lowest bits first."""


def pack_codes(code: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] below 2^bits into bytes uint8 [..., n * bits / 8].

    bits: 8, 5, 4, 3, 2 or 1. Raises ShapeError unless 8 divides n.
    """
    if code.shape[-1] % 8:
        raise ShapeError(f"code: expected a multiple of 8 codes in the last dimension, got {code.shape[-1]}")
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((code >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(planes, -1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: bytes uint8 [..., n * bits / 8] -> codes uint8 [..., n], with the same `bits`."""
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
