"""KVarN (Mueller et al., arXiv 2606.03458): rotation, variance normalization along both axes of a tile, then rounding.

Tiles of 128 tokens of one head. After a Hadamard rotation of the channels, standard deviations of columns and rows
are divided out in turn (Sinkhorn-like, in the log domain, 16 rounds, the round of least imbalance is kept), and each
row is rounded to 2^bits levels between its min and max. Rows are channels for keys and tokens for values; the
preset K4V2 gives keys 4 bits and values 2. Details are those of the authors' published reference: unbiased standard
deviations clamped to [1e-3, 1e3], log scales clamped to [-0.3, 10], and

    imbalance = max / min of the columns' deviations + max / min of the rows'

Stored per tile: codes, a scale and a zero per row with the row's normalization folded in, and one scale per column,
float16. In float16 too: the first 128 tokens (sinks, as in the vLLM backend) and the last, incomplete tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .hadamard import rotate_blocks
from .stream import FLOAT_BITS, Restored, as_half

_DEVIATION = 1e-3, 1e3
_LOG_SCALE = -0.3, 10.0


@dataclass(frozen=True)
class KVarN:
    """K (``axis="channel"``) or V (``axis="token"``)."""

    axis: Literal["channel", "token"]
    bits: int
    tile: int = 128
    sink: int = 128
    iterations: int = 16

    def settled(self, length: int) -> int:
        return length - length % self.tile

    def __call__(self, x: Tensor, start: int) -> Restored:
        sinks = min(max(self.sink - start, 0), x.shape[2])
        first, rest = x[:, :, :sinks], x[:, :, sinks:]
        if not rest.shape[2]:
            return Restored(x, FLOAT_BITS * x.numel())
        tiles = rotate_blocks(rest, x.shape[3]).unflatten(2, (-1, self.tile))
        rows = tiles.transpose(3, 4) if self.axis == "channel" else tiles
        rows, bits = quantize_rows(rows, self.bits, self.iterations)
        tiles = rows.transpose(3, 4) if self.axis == "channel" else rows
        restored = rotate_blocks(tiles.flatten(2, 3), x.shape[3])
        return Restored(torch.cat([first, restored], 2), bits + FLOAT_BITS * first.numel())


def quantize_rows(tile: Tensor, bits: int, iterations: int) -> Restored:
    """tile [..., R, C], normalized along both axes and rounded row by row: ``(code * scale + zero) * column``."""
    row, column = normalize(tile, iterations)
    even = tile / column / row
    low, high = even.amin(-1, keepdim=True), even.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
    codes = ((even - low) / scale).round().clamp(0, 2**bits - 1)
    scale, zero, column = as_half(row * scale), as_half(row * low), as_half(column)
    stored = bits * tile.numel() + FLOAT_BITS * (scale.numel() + zero.numel() + column.numel())
    return Restored((codes * scale + zero) * column, stored)


def normalize(tile: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Scales of the rows [..., R, 1] and columns [..., 1, C] that make their standard deviations most alike."""
    log_row, log_column = torch.zeros_like(tile[..., :1]), torch.zeros_like(tile[..., :1, :])
    even, least = tile, _imbalance(tile)
    row, column = log_row.exp(), log_column.exp()
    for _ in range(iterations):
        log_column = (log_column + even.std(-2, keepdim=True).clamp(*_DEVIATION).log()).clamp(*_LOG_SCALE)
        even = tile / log_column.exp() / log_row.exp()
        log_row = (log_row + even.std(-1, keepdim=True).clamp(*_DEVIATION).log()).clamp(*_LOG_SCALE)
        even = tile / log_column.exp() / log_row.exp()
        imbalance = _imbalance(even)
        better = imbalance <= least
        least = torch.where(better, imbalance, least)
        row, column = torch.where(better, log_row.exp(), row), torch.where(better, log_column.exp(), column)
    return row, column


def _imbalance(tile: Tensor) -> Tensor:
    """[..., 1, 1]."""
    return sum(
        (deviation.amax((-2, -1), keepdim=True) / deviation.amin((-2, -1), keepdim=True).clamp(min=1e-8))
        for deviation in (tile.std(-2, keepdim=True), tile.std(-1, keepdim=True))
    )  # type: ignore[return-value]
