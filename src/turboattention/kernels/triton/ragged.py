"""Ragged batches: sequences with different numbers of rows, concatenated in flat tensors.

Kernels read each sequence's first row, length and slot from device memory; grids depend only on shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_at(starts, sequences, bisections, i, times, over, SEPARATE: tl.constexpr):
    """The last sequence b with `starts[b] times // over + SEPARATE b <= i`, int32, for a scalar or tensor i.

    Binary search; bisections: the bit length of `sequences`. If each token has `times` rows and programs take `over`
    rows, this expression with SEPARATE = 1 is the first program of sequence b: programs do not span sequences, and some
    are empty.
    """
    low = i * 0
    high = low + sequences
    for _ in range(bisections):
        middle = (low + high) // 2
        first = tl.load(starts + middle).to(tl.int32) * times // over + SEPARATE * middle
        low = tl.where(first <= i, middle, low)
        high = tl.where(first <= i, high, middle)
    return low


@triton.jit
def span_of(starts, lengths, b):
    """First row, number of rows, and length including them, of sequence b; int32."""
    first = tl.load(starts + b).to(tl.int32)
    return first, tl.load(starts + b + 1).to(tl.int32) - first, tl.load(lengths + b).to(tl.int32)


@triton.jit
def tail_rows_of(tail_slots, b, h, heads, first, block, start, ring, room, RING: tl.constexpr):
    """Row (int64) of the first token of an INT8 block in codes and scales.

    With RING, position p is row p % ring of the sequence's slot [slots, heads, ring]. Otherwise rows are temporary,
    [heads, room]: those of sequence b start at `first + 64 b`, with its block `start`.
    """
    if RING:
        row = (tl.load(tail_slots + b).to(tl.int64) * heads + h) * ring + block * 64 % ring
    else:
        row = h.to(tl.int64) * room + (first + 64 * b + (block - start) * 64)
    return row
