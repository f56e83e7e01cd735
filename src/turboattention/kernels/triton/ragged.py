"""Ragged batches on the device: sequences of different counts, one behind the other in flat tensors.

Where a sequence's rows begin, how many tokens it has and where its open block lies is read by the kernels; grids
follow from shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_at(starts, sequences, steps, i, times, over, APART: tl.constexpr):
    """The last sequence b with `starts[b] times // over + APART b <= i`, int32 like i (a number or many).

    steps: the bit length of `sequences`. Cut into pieces of `over` of its `times` a token, sequence b has its first
    piece there where APART is 1: pieces of different sequences are then apart, and some are empty.
    """
    low = i * 0
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        first = tl.load(starts + middle).to(tl.int32) * times // over + APART * middle
        low = tl.where(first <= i, middle, low)
        high = tl.where(first <= i, high, middle)
    return low


@triton.jit
def standing(starts, lengths, b):
    """Of sequence b, int32: its first row, the number of its rows, and its tokens with them."""
    first = tl.load(starts + b).to(tl.int32)
    return first, tl.load(starts + b + 1).to(tl.int32) - first, tl.load(lengths + b).to(tl.int32)


@triton.jit
def open_rows_of(slots, b, h, heads, first, block, start, ring, room, RING: tl.constexpr):
    """The row, int64, that token 0 of an open block has in codes and scales.

    RING: in the sequence's slot [slots, heads, ring], position p in row p % ring. Else in rows of the step's own
    [heads, room]: sequence b has those from `first + 64 b` on, its block `start` first.
    """
    if RING:
        row = (tl.load(slots + b).to(tl.int64) * heads + h) * ring + block * 64 % ring
    else:
        row = h.to(tl.int64) * room + (first + 64 * b + (block - start) * 64)
    return row
