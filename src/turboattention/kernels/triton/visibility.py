"""Visibility of keys: lengths, causal mask, window and attn_mask.

Row r of a KV head is query `r // group` of query head `r % group` in its GQA group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_range(row, group, first, valid, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Each row sees keys `begin <= key < end`; end is 0 if it sees none, as do queries from `valid` on."""
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
    """Apply a mask to scores x, which have keys along AXIS. KIND: "bool" (bytes, 0 hides a key) or "add".

    mask: (pointer to the sequence's mask, rows, first query head of the group, group size, strides of heads, queries
    and keys, number of keys). keys: positions that broadcast to x; those past the mask are past all lengths too.
    """
    pointer, row, head, group, stride_h, stride_q, stride_k, last = mask
    at = (head + row % group).to(tl.int64) * stride_h + (row // group).to(tl.int64) * stride_q
    # A load mask keeps addresses contiguous and needs fewer registers than clamping them.
    value = tl.load(tl.expand_dims(pointer + at, AXIS) + keys.to(tl.int64) * stride_k, mask=keys < last, other=0)
    if KIND == "bool":
        x = tl.where(value != 0, x, float("-inf"))
    else:
        x += value.to(tl.float32)
    return x
