"""Backend "cpu" over pages that a server manages (`turboattention.paged`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...kernels.cpu.paged import PagedCall
from ...kv.paged import PagedBatch, PagedFormat, TailBlocks
from ...params import AttentionParams
from .groups import grouped


def paged_attention(
    fmt: PagedFormat,
    layer: int,
    batch: PagedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pages: Tensor,
    tail_blocks: TailBlocks,
    params: AttentionParams,
    sinks: Tensor | None,
) -> bool:
    """`turboattention.paged.paged_attention` with checked arguments; False if values were not finite."""
    config, layout, mean = fmt.config, fmt.layouts[layer], fmt.stored_means[layer]
    base, stride = pages.data_ptr(), pages.stride(0)
    # Layers with equal shapes of slots and pages share the groups.
    alike = layout.num_kv_heads * tail_blocks.ring, tail_blocks.ring, stride
    groups = batch.once(alike, lambda: grouped(batch, *alike))
    for group in groups:
        group.check(len(pages), tail_blocks.num_slots)
    heads = q.shape[1] // layout.num_kv_heads
    calls = batch.once(
        (alike, config, layout, params, heads),
        lambda: [PagedCall(config, layout, group.rows, params, group=heads) for group in groups],
    )
    parts, finite = [], True
    for group, call in zip(groups, calls, strict=True):
        tail, fresh = group.tail_rows(tail_blocks, layer), group.fresh(base)
        means = None if mean is None else mean.expand(len(group.slots), -1, -1).contiguous()
        call.take_order(fmt.order_tables[layer])
        parts.append((call, means, tail, group.offsets + base))
        try:
            call.store(k, v, means, tail, fresh)
        except NonFiniteError:
            finite, k, v = False, _cleaned(k), _cleaned(v)
            call.store(k, v, means, tail, fresh)
        group.keep_last(tail_blocks, layer, tail)
    for call, means, tail, addresses in parts:
        finite &= call.attend(q, out, means, tail, addresses, sinks)
    return finite


def _cleaned(x: Tensor) -> Tensor:
    """Replace values that are not finite, or above 1e18 in magnitude, by zeros."""
    return torch.where(x.float().abs() <= 1e18, x, 0)
