"""Backend "triton" over pages that a server manages (`turboattention.paged`), without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from ...kernels.triton.call import FORMS
from ...kernels.triton.configs import LARGEST_GRID
from ...kernels.triton.paged import LayerTail, Ragged, attend, store
from ...kv.paged import BLOCK, PagedBatch, PagedFormat, TailBlocks
from ...params import AttentionParams
from .device import on_own_device

_INTEGERS = (torch.int32, torch.int64)
_LARGEST_OFFSET = 2**31 - 1
"""Of INT8 queries within a KV head, in bytes."""


@on_own_device
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
    """`turboattention.paged.paged_attention` with checked arguments.

    Always returns True: `TailBlocks.poll_nonfinite` reports values that are not finite.
    """
    if sinks is not None:
        raise UnsupportedError("sinks: expected None for pages on a GPU, got sink logits (backend 'cpu' supports them)")
    if fmt.config.softmax not in FORMS:
        raise UnsupportedError(
            f"softmax: expected one of {', '.join(FORMS)} for pages on a GPU, got {fmt.config.softmax!r}"
        )
    ragged = _ragged(batch, q, fmt.layouts[layer].num_kv_heads)
    _check_alignment(pages)
    if not ragged.tokens or not ragged.sequences:
        return True
    config, layout, mean = fmt.config, fmt.layouts[layer], fmt.stored_means[layer]
    layer_tail, flag = LayerTail(*tail_blocks.of(layer), tail_blocks.ring), tail_blocks.flag
    tail = store(config, layout, ragged, k, v, mean, pages, layer_tail, flag)
    attend(config, layout, ragged, q, out, mean, pages, layer_tail, tail, flag, params)
    return True


def _ragged(batch: PagedBatch, q: Tensor, kv_heads: int) -> Ragged:
    parts = {"query_start": batch.query_start, "seq_lens": batch.seq_lens, "tail_slots": batch.tail_slots}
    parts["block_table"] = batch.block_table
    for name, x in parts.items():
        if x.dtype not in _INTEGERS or x.device != q.device or x.stride(-1) != 1:
            raise ShapeError(
                f"{name}: expected int32 or int64 on {q.device} with last stride 1, got {x.dtype} on {x.device}, "
                f"strides {x.stride()}"
            )
    tokens, sequences = q.shape[0], batch.seq_lens.shape[0]
    if sequences + tokens // BLOCK >= LARGEST_GRID:
        raise UnsupportedError(
            f"batch: expected fewer than {LARGEST_GRID} sequences and blocks of new tokens together, got {sequences} "
            f"sequences of {tokens} tokens"
        )
    if q.numel() // kv_heads > _LARGEST_OFFSET:
        longest = _LARGEST_OFFSET // (q[0].numel() // kv_heads)
        raise UnsupportedError(f"q: expected at most {longest} tokens in a step, got {tokens}")
    most = tokens if batch.max_query_len is None else min(tokens, batch.max_query_len)
    return Ragged(batch.query_start, batch.seq_lens, batch.tail_slots, batch.block_table, tokens, most)


def _check_alignment(pages: Tensor) -> None:
    if pages.data_ptr() % 16 or pages.stride(0) % 16:
        raise ShapeError(f"pages: expected addresses that are multiples of 16, got {pages.data_ptr():#x} and strides "
                         f"{pages.stride()}")  # fmt: skip
