"""Launcher of `prefill`: many query rows over blocks that are unpacked first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import BLOCK
from . import configs
from .call import AttentionCall, ordered_arguments
from .fresh import quantize_and_unpack
from .page_offsets import all_page_offsets, widths_masks
from .prefill import prefill
from .unpacked_kv import bytes_per_block, unpack_pages, unpack_rows

UNPACKED_BYTES = 1 << 28
"""Memory for unpacked blocks; more where a single KV head of one sequence needs it."""


def attend_prefill_rows(call: AttentionCall) -> None:
    """Blocks are unpacked once, for as many heads and sequences at a time as memory allows."""
    wider = max(call.head_dim, call.v_head_dim)
    launch = configs.prefill(call.architecture, wider, call.params.attn_mask is not None)
    device, parts = call.out.device, list(_parts(call))
    for sequences, heads in parts:
        shape = len(sequences), len(heads), max(1, call.blocks)
        sizes = call.wide, call.v_wide
        k, v = (torch.empty(*shape, BLOCK, size, dtype=torch.int8, device=device) for size in sizes)
        k_scale, v_level = (torch.empty(*shape, BLOCK, dtype=torch.float32, device=device) for _ in range(2))
        unpacked = k, v, k_scale, v_level, torch.empty(shape, dtype=torch.float32, device=device)
        _unpack(call, sequences, heads, unpacked)
        prefill[-(-call.rows // launch.rows), len(heads), len(sequences)](
            **call.row_arguments(),
            **ordered_arguments(call.quantized),
            counts_ptr=call.pages.counts if call.pages else None,
            sink_blocks=call.pages.sink_blocks if call.pages else 0,
            **dict(zip(("k_ptr", "v_ptr", "k_scale_ptr", "v_level_ptr", "v_scale_ptr"), unpacked, strict=True)),
            flag_ptr=call.fresh.flag if call.fresh else None,
            out_ptr=call.out,
            lse_ptr=call.lse,
            first_head=heads.start,
            first_sequence=sequences.start,
            blocks=shape[2],
            kv_heads=call.kv_heads,
            group=call.group,
            queries=call.queries,
            D=call.head_dim,
            WIDE=call.wide,
            DV=call.v_head_dim,
            V_WIDE=call.v_wide,
            M=launch.rows,
            ROTATE=call.config.rotate,
            SLOW=call.architecture.slow_int_to_float,
            SKIP=call.architecture.skips_rescaling,
            **call.visibility_arguments(),
            **launch.options,
        )
    if call.fresh is not None and len(parts) > 1:  # a later part may have raised the flag
        bad = call.fresh.flag != 0
        call.out.masked_fill_(bad, torch.nan)
        call.lse.masked_fill_(bad, torch.nan)


def _parts(call: AttentionCall) -> Iterator[tuple[range, range]]:
    """Ranges of sequences and KV heads whose unpacked blocks fit in `UNPACKED_BYTES`, at least one of each."""
    fitting = max(1, UNPACKED_BYTES // max(1, call.blocks * bytes_per_block(call.wide, call.v_wide)))
    heads = min(fitting, call.kv_heads)
    sequences = min(max(1, fitting // call.kv_heads), configs.LARGEST_GRID // 2)  # K and V are two programs
    for b in range(0, call.batch, sequences):
        for h in range(0, call.kv_heads, heads):
            yield range(b, min(b + sequences, call.batch)), range(h, min(h + heads, call.kv_heads))


def _unpack(call: AttentionCall, sequences: range, heads: range, unpacked: tuple[Tensor, ...]) -> None:
    pages, tail, device = call.pages, call.tail, call.out.device
    if call.fresh is not None:
        x = call.fresh
        quantize_and_unpack((x.k, x.v), x.mean, call.config.rotate, x.flag, sequences, heads, unpacked)
        return
    sizes = {"first_head": heads.start, "first_sequence": sequences.start, "blocks": max(1, call.blocks)}
    shape = {"D": call.head_dim, "WIDE": call.wide, "DV": call.v_head_dim, "V_WIDE": call.v_wide}
    if pages is not None:
        columns = pages.addresses.shape[1]
        sinks = min(pages.sink_blocks, columns)
        for layout, first, last in ((pages.sinks, 0, sinks), (pages.compressed, sinks, columns)):
            if layout is None or first == last:
                continue
            unpack_pages[last - first, len(heads), len(sequences)](
                pages.addresses, pages.counts, all_page_offsets(layout, device), *unpacked, pages.addresses.stride(0),
                first, heads=len(heads), **sizes, **shape, **widths_masks(layout), BY_TOKEN=layout.token_scales,
                **configs.FUSION,
            )  # fmt: skip
    if tail is not None:
        unpack_rows[-(-tail.k8.shape[2] // BLOCK), len(heads), len(sequences)](
            tail.k8, tail.v8, tail.k_scale, tail.v_scale, tail.start, call.query_positions.lengths, *unpacked,
            tail.k8.shape[2], call.kv_heads, **sizes, **shape, **configs.FUSION,
        )  # fmt: skip
