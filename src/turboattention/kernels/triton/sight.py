"""Which keys a query row sees: lengths, causality, window; and masks.

Rows of a KV head are counted query by query, the `group` query heads of a query side by side:
row r is query `r // group` of query head `r % group`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sight(row, group, first, valid, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys `begin <= key < end` that each row sees (none: end 0). Rows from `valid` queries on see none."""
    position = first + row // group
    end = tl.zeros_like(row) + length
    begin = tl.zeros_like(row)
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOW:
        begin = tl.maximum(position - window + 1, 0)
        if not CAUSAL:
            end = tl.minimum(end, position + window)
    return begin, tl.where(row // group < valid, tl.maximum(end, 0), 0)


@triton.jit
def masked(x, mask, keys, AXIS: tl.constexpr, KIND: tl.constexpr):
    """Scores x, keys along AXIS, with a mask applied: KIND "bool" (bytes, zero hides) or "add".

    mask: (pointer of the sequence's, row, head, group, strides of heads, queries and keys, keys), `head` the
    first query head of the group; keys: positions that broadcast to x. Those past the mask are past every
    length too.
    """
    pointer, row, head, group, stride_h, stride_q, stride_k, last = mask
    at = (head + row % group).to(tl.int64) * stride_h + (row // group).to(tl.int64) * stride_q
    # Keys side by side stay so in the addresses: fewer registers than a minimum takes.
    value = tl.load(tl.expand_dims(pointer + at, AXIS) + keys.to(tl.int64) * stride_k, mask=keys < last, other=0)
    if KIND == "bool":
        x = tl.where(value != 0, x, float("-inf"))
    else:
        x += value.to(tl.float32)
    return x
