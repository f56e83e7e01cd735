"""Asymmetric min-max quantization of groups, as KIVI, GEAR, SAW-INT4 and plain per-token caches use it."""

from __future__ import annotations

from torch import Tensor

from ...errors import UnsupportedError
from .stream import FLOAT_BITS, Restored, as_half


def min_max(x: Tensor, bits: int, dim: int | tuple[int, ...]) -> Restored:
    """Round to 2^bits levels between the least and the largest value of each group; `dim` runs inside a group.

    ``scale = (max - min) / (2^bits - 1)``, ``code = round((x - min) / scale)``, and back ``code * scale + min``
    (KIVI, arXiv 2402.02750, section 3.1). Scale and min are stored in float16, and codes are taken against the
    stored ones. A group of one value has scale 0 and is restored as its min.
    """
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, low = as_half((high - low) / levels), as_half(low)
    codes = ((x - low) / scale.where(scale > 0, 1.0)).round().clamp(0, levels)
    return Restored(codes * scale + low, bits * x.numel() + 2 * FLOAT_BITS * low.numel())


def min_max_along(x: Tensor, bits: int, dim: int, group: int) -> Restored:
    """`min_max` of groups of `group` consecutive values along `dim` of x [B, H, T, D]: 2 for tokens, 3 for channels.

    Raises:
        UnsupportedError: they do not divide into groups.
    """
    if x.shape[dim] % group:
        name = "head_dim" if dim == 3 else "tokens"
        raise UnsupportedError(f"{name}: expected a multiple of the method's group size {group}, got {x.shape[dim]}")
    values, stored = min_max(x.unflatten(dim, (-1, group)), bits, dim + 1)
    return Restored(values.flatten(dim, dim + 1), stored)
