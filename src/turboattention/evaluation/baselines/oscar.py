"""OSCAR (Zhou et al., arXiv 2605.17757): INT2 after a rotation that is fitted to the queries.

Offline, on a calibration text, each layer gets two rotations ``R = U H P``: U holds the eigenvectors of

    sum Q^T Q over heads and tokens                                     (for keys)
    sum V^T diag(w) V,  w_t = k_t (Q^T Q) k_t^T with the head's queries  (for values)

sorted by decreasing eigenvalue, H is a Hadamard matrix, and P the bit-reversal permutation, which distributes all
directions evenly over the groups of channels. Online, each token is rotated, clipped at a quantile of its magnitudes
(0.96 for keys, 0.92 for values), and rounded to four levels between its min and max, in groups of 128 channels
(head_dim if that is less). The first 64 and the last 256 tokens stay in 16 bits.

Settings are those of the authors' published code. Assumed: scale and zero of 16 bits each (the published 2.28 bits at
head_dim 128 and long contexts); Q^T Q of a head's weight w is that of the query heads that share its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .groups import min_max
from .hadamard import rotate_blocks
from .stream import FLOAT_BITS, Restored

GROUP = 128
SINKS, RECENT = 64, 256
CLIP_KEYS, CLIP_VALUES = 0.96, 0.92


class Moments(NamedTuple):
    """float64 [D, D] of one layer: the matrices to which the rotations of its keys and values are fitted."""

    keys: Tensor
    values: Tensor


def moments(query: Tensor, key: Tensor, value: Tensor) -> Moments:
    """The moments of query [1, Hq, T, D] and key, value [1, Hkv, T, D], the inputs of attention."""
    heads, tokens = key.shape[1], key.shape[2]
    q, k, v = (x[0].double() for x in (query, key, value))
    grouped = q.unflatten(0, (heads, -1)).flatten(1, 2)
    of_queries = grouped.mT @ grouped / tokens
    weights = ((k @ of_queries) * k).sum(-1, keepdim=True)
    return Moments(of_queries.mean(0), ((v * weights).mT @ v / tokens).mean(0))


def rotation(moment: Tensor) -> Tensor:
    """Orthogonal float64 [D, D]: ``U H P``, applied as ``x @ R``."""
    size = len(moment)
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)
    return rotate_blocks(vectors, size)[:, bit_reversal(size)]


def bit_reversal(size: int) -> Tensor:
    """int64 [size]: numbers with their binary digits reversed.

    Raises:
        UnsupportedError: the size is no power of two.
    """
    width = size.bit_length() - 1
    if size != 1 << width:
        raise UnsupportedError(f"head_dim: expected a power of two for OSCAR's permutation, got {size}")
    return torch.tensor([int(f"{at:0{width}b}"[::-1], 2) if width else 0 for at in range(size)])


@dataclass(frozen=True)
class ClippedInt2:
    """One layer's keys or values."""

    rotation: Tensor
    clip: float

    def settled(self, length: int) -> int:
        return max(length - RECENT, 0)

    def __call__(self, x: Tensor, start: int) -> Restored:
        sinks = min(max(SINKS - start, 0), x.shape[2])
        first, rest = x[:, :, :sinks], x[:, :, sinks:]
        matrix = self.rotation.to(rest)
        turned = clipped(rest @ matrix, self.clip)
        values, bits = min_max(turned.unflatten(-1, (-1, min(GROUP, x.shape[3]))), 2, -1)
        restored = values.flatten(-2) @ matrix.T
        return Restored(torch.cat([first, restored], 2), bits + FLOAT_BITS * first.numel())


def clipped(x: Tensor, ratio: float) -> Tensor:
    """x [..., D] within the `ratio` quantile of each row's magnitudes: the floor(ratio D)-th of them, from 0."""
    at = min(int(ratio * x.shape[-1]), x.shape[-1] - 1)
    most = x.abs().sort(-1).values[..., at : at + 1]
    return torch.minimum(torch.maximum(x, -most), most)


def quantizers(layers: Sequence[Moments]) -> tuple[list[ClippedInt2], list[ClippedInt2]]:
    """For the keys and the values of each layer."""
    keys = [ClippedInt2(rotation(layer.keys), CLIP_KEYS) for layer in layers]
    return keys, [ClippedInt2(rotation(layer.values), CLIP_VALUES) for layer in layers]
