"""Lengths of sequences before and after a step, on the device: where its queries stand, and which blocks are full.

A launch each, where PyTorch would take one for every sum and comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Pages, Standing


@triton.jit(do_not_specialize=["batch", "tokens", "queries"])
def _stand(lengths, counts, taken, first, valid, after, batch, tokens, queries, SIZE: tl.constexpr):
    b = tl.arange(0, SIZE)
    there = b < batch
    n = tl.zeros((SIZE,), tl.int64) + tokens
    rows = tl.zeros((SIZE,), tl.int64) + queries
    if counts is not None:
        n = tl.load(counts + b, mask=there, other=0)
        rows = n
    length = tl.load(lengths + b, mask=there, other=0) + n
    tl.store(taken + b, n, mask=there)
    tl.store(valid + b, rows, mask=there)
    tl.store(after + b, length, mask=there)
    tl.store(first + b, length - rows, mask=there)


@triton.jit(do_not_specialize=["batch", "columns", "stride", "sink_blocks", "lag"])
def _advance(
    lengths, taken, start, page_counts, table, fresh_sinks, fresh_pages, batch, columns, stride, sink_blocks, lag,
    SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, SIZE)
    there = b < batch
    length = tl.load(lengths + b, mask=there, other=0) + tl.load(taken + b, mask=there, other=0)
    tl.store(lengths + b, length, mask=there)
    if table is not None:
        first = tl.load(start + b, mask=there, other=0)
        full = there & (length - first - lag >= 64)
        pages = tl.load(page_counts + b, mask=there, other=0)
        column = tl.minimum(pages, columns - 1)
        fresh = tl.load(table + b.to(tl.int64) * stride + column, mask=full, other=0)
        sink = pages < sink_blocks
        tl.store(fresh_sinks + b, tl.where(sink, fresh, 0), mask=there)
        tl.store(fresh_pages + b, tl.where(sink, 0, fresh), mask=there)
        tl.store(page_counts + b, pages + full.to(tl.int64), mask=there)
        tl.store(start + b, first + full.to(tl.int64) * 64, mask=there)


@dataclass(frozen=True)
class Taken:
    """Of a step: the tokens that each sequence takes (int64 [B]), and where its queries stand with them."""

    tokens: Tensor
    standing: Standing


def stand(lengths: Tensor, tokens: int, queries: int, counts: Tensor | None) -> Taken:
    """lengths: int64 [B] before the step. Without counts (int64 [B]) every sequence takes `tokens`, and `queries` rows
    of it count; with them its own number of both."""
    batch = len(lengths)
    taken, first, valid, after = torch.empty(4, batch, dtype=torch.int64, device=lengths.device)
    if batch:
        _stand[(1,)](lengths, counts, taken, first, valid, after, batch, tokens, queries, **_shape(batch))
    return Taken(taken, Standing(first, valid, after))


def advance(lengths: Tensor, taken: Tensor, start: Tensor, pages: Pages | None, lag: int) -> tuple[Tensor, Tensor]:
    """Add `taken` to `lengths`; and where `pages` are given, note the first open block of each sequence that is full
    and does not wait (`lag` tokens) as a page: counts and `start` go on by a block. All int64 [B], changed in place.

    Returns the addresses of pages that blocks are to be compressed into, of INT8 ones and of others, int64 [B] each, 0
    where none is; zeros without `pages`."""
    batch = len(lengths)
    fresh_sinks, fresh_pages = torch.zeros(2, batch, dtype=torch.int64, device=lengths.device)
    if batch:
        table = pages.addresses if pages else None
        _advance[(1,)](
            lengths, taken, start, pages.counts if pages else None, table, fresh_sinks, fresh_pages, batch,
            pages.addresses.shape[1] if pages else 0, pages.addresses.stride(0) if pages else 0,
            pages.sink_blocks if pages else 0, lag, **_shape(batch),
        )  # fmt: skip
    return fresh_sinks, fresh_pages


def _shape(batch: int) -> dict[str, int]:
    size = triton.next_power_of_2(batch)
    return {"SIZE": size, "num_warps": min(8, max(1, size // 128))}
