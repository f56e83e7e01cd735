"""Launches `decode`: few query rows over packed pages."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...kv.layout import WIDEST, PageLayout
from ...modes import in_own_modes
from ..inputs import BLOCK
from . import configs
from .call import AttentionCall, ordered_arguments
from .combine import combine
from .decode import decode
from .page_offsets import all_page_offsets, pairs_mask, widths_of


def attend_decode_rows(call: AttentionCall) -> None:
    """Split-KV attention over packed pages, then `combine`."""
    for part in call.parts(configs.LARGEST_GRID):
        _attend(part)


def _attend(call: AttentionCall) -> None:
    adjusted = call.params.attn_mask is not None or call.params.softcap is not None
    device, pages, tail = call.out.device, call.pages, call.tail
    widths = widths_of(pages.compressed) if pages and pages.compressed else ()
    launch = configs.decode(
        call.architecture, call.rows, max(call.head_dim, call.v_head_dim), adjusted, len(widths) > 1
    )
    tiles = -(-call.rows // launch.rows)
    held = configs.resident(launch, max(call.wide, call.v_wide), widths, device)
    splits = configs.splits(call.blocks, call.batch * call.kv_heads * tiles, held)
    shape = call.batch, call.kv_heads, tiles, splits, launch.rows
    acc = torch.empty(*shape, call.v_wide, dtype=torch.float32, device=device)
    row_max, row_sum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    plain = PageLayout.uniform(call.kv_heads, call.head_dim, BLOCK, WIDEST, call.config.token_scales)
    sinks, compressed = (pages.sinks, pages.compressed) if pages else (plain, None)
    sizes = [layout.page_bytes for layout in (sinks, compressed) if layout is not None]
    arguments = {
        **call.row_arguments(),
        **ordered_arguments(call.quantized),
        "table_ptr": pages.addresses if pages else None,
        "counts_ptr": pages.counts if pages else None,
        "table_stride": pages.addresses.stride(0) if pages else 0,
        "blank_ptr": _blank(max(sizes), device) if pages else None,
        "sink_blocks": pages.sink_blocks if pages else 0,
        "k8_ptr": tail.k8 if tail else None,
        "v8_ptr": tail.v8 if tail else None,
        "ks_ptr": tail.k_scale if tail else None,
        "vs_ptr": tail.v_scale if tail else None,
        "start_ptr": tail.start if tail else None,
        "width": tail.k8.shape[2] if tail else 0,
        "acc_ptr": acc,
        "row_max_ptr": row_max,
        "row_sum_ptr": row_sum,
        "kv_heads": call.kv_heads,
        "group": call.group,
        "queries": call.queries,
        "tiles": tiles,
        "D": call.head_dim,
        "WIDE": call.wide,
        "DV": call.v_head_dim,
        "V_WIDE": call.v_wide,
        "R": launch.rows,
        "ASM": call.architecture.assembly,
        "SINKS": pages is not None and pages.sink_blocks > 0,
        "OPEN": tail is not None,
        "BY_TOKEN": sinks.token_scales,
        **call.visibility_arguments(),
        **launch.options,
    }
    decode[splits, call.kv_heads * tiles, call.batch](
        **arguments,
        sink_page_offsets_ptr=all_page_offsets(sinks, device),
        page_offsets_ptr=all_page_offsets(compressed or plain, device),
        PAIRS=pairs_mask(compressed) if compressed else 0,
    )
    combine[call.rows, call.kv_heads, call.batch](
        acc, row_max, row_sum, call.out, call.lse, None, splits, tiles, call.group, call.queries, None, None, None,
        D=call.v_head_dim, WIDE=call.v_wide, R=launch.rows, SPLITS=1 << (splits - 1).bit_length(),
        ROTATE=call.config.rotate, num_warps=1, **configs.FUSION,
    )  # fmt: skip


@functools.cache  # kept forever, like `head_page_offsets`
@in_own_modes
def _blank(size: int, device: torch.device) -> Tensor:
    """A page of zeros, read instead of evicted pages; its values are not used."""
    return torch.zeros(size, dtype=torch.uint8, device=device)
