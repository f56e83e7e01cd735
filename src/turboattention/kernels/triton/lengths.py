"""Lengths, query positions and full blocks of a step, computed on the device.

One launch each, where PyTorch would need one per operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Pages, QueryPositions


@triton.jit(do_not_specialize=["batch", "tokens", "queries"])
def _new_tokens(lengths, counts, taken, first, valid, after, batch, tokens, queries, SIZE: tl.constexpr):
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
class NewTokens:
    """New tokens of each sequence in a step, int64 [B], and the positions of its queries."""

    tokens: Tensor
    query_positions: QueryPositions


def new_tokens(lengths: Tensor, tokens: int, queries: int, counts: Tensor | None) -> NewTokens:
    """New tokens and query positions of a step.

    lengths: int64 [B] before the step. counts: int64 [B], new tokens and valid query rows of each sequence; if None,
    each has `tokens` new tokens and `queries` query rows."""
    batch = len(lengths)
    taken, first, valid, after = torch.empty(4, batch, dtype=torch.int64, device=lengths.device)
    if batch:
        _new_tokens[(1,)](lengths, counts, taken, first, valid, after, batch, tokens, queries, **_shape(batch))
    return NewTokens(taken, QueryPositions(first, valid, after))


def advance(lengths: Tensor, taken: Tensor, start: Tensor, pages: Pages | None, lag: int) -> tuple[Tensor, Tensor]:
    """Add `taken` to `lengths` and, with `pages`, count full blocks as pages. All int64 [B], updated in place.

    The first buffered block of a sequence becomes a page if it is full and at least `lag` tokens follow it: the page
    count grows by 1 and `start` by a block.

    Returns the addresses of the pages for these blocks, sink pages and compressed pages, int64 [B] each; 0 if there is
    none."""
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
