"""Launchers of `storing`, `paged_decode` and `paged_prefill`: a server's step over pages that the server manages.

No launcher reads a tensor's values: kernels make decisions that depend on values, and grids follow from shapes and from
`Ragged.most`. A CUDA graph can capture these launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...config import TurboConfig
from ...kv.layout import PageLayout
from ...params import AttentionParams
from ..inputs import BLOCK
from . import configs
from .arguments import float_rows, means, pair_shape
from .call import padded, query_arguments, softmax_arguments, with_positive_unit
from .combine import combine
from .page_offsets import all_page_offsets, head_page_offsets, pairs_mask, pairs_of_widths, widths_of
from .paged_decode import paged_decode
from .paged_prefill import paged_prefill
from .pages import layout_facts
from .quantize import quantize_queries
from .restored_pages import NOTHING_RESTORED, restored
from .storing import fill_pages, hold_rows, store_rows


@dataclass(frozen=True)
class Ragged:
    """R sequences, concatenated in flat tensors of T tokens.

    starts: [R + 1], first row of each sequence; rows from `starts[R]` on are padding. lengths: [R], tokens including
    this step's. tail_slots: [R]. table: [R, P], page numbers. All int32 or int64 with last stride 1. tokens: T. most:
    an upper bound of the new tokens per sequence."""

    starts: Tensor
    lengths: Tensor
    tail_slots: Tensor
    table: Tensor
    tokens: int
    most: int

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def bisections(self) -> int:
        """Iterations of `ragged.sequence_at`."""
        return self.sequences.bit_length()


@dataclass(frozen=True)
class LayerTail:
    """Tail blocks of a layer: codes int8 [slots, H, ring, D] and scales float32 [slots, H, ring] of K and V,
    contiguous."""

    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    ring: int


@dataclass(frozen=True)
class StepTail:
    """The INT8 rows that a step reads: tail slots (in_place), or temporary codes [H, room, D], scales [H, room]."""

    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    room: int
    in_place: bool


def store(
    config: TurboConfig,
    layout: PageLayout,
    batch: Ragged,
    k: Tensor,
    v: Tensor,
    mean: Tensor | None,
    pages: Tensor,
    layer_tail: LayerTail,
    flag: Tensor,
) -> StepTail:
    """Store k, v [T, H, D] as INT8 tail rows, then compress full blocks into `pages` uint8 [N, bytes].

    mean: bfloat16 [H, D] in the stored space, or None. flag: as in `append.store_tokens`. A step whose tokens do not
    fit in the tail slots allocates `2 H (T + 64 R) (D + 4)` temporary bytes. Raises DtypeError."""
    k, v = map(float_rows, (k, v))
    heads, head_dim = k.shape[1:]
    # Tokens fit in a slot if they do not overwrite rows that this step's queries still read.
    in_place = batch.most == 1 or (layer_tail.ring > BLOCK and batch.most <= BLOCK)
    tail = StepTail(layer_tail.codes, layer_tail.scales, 0, True)
    rows = batch.tokens * heads
    shape = pair_shape(rows, head_dim, head_dim)
    if not in_place:
        room = batch.tokens + BLOCK * batch.sequences
        codes = tuple(torch.empty(heads, room, head_dim, dtype=torch.int8, device=k.device) for _ in range(2))
        scales = tuple(torch.empty(heads, room, dtype=torch.float32, device=k.device) for _ in range(2))
        tail = StepTail(codes, scales, room, False)
        hold_rows[batch.sequences, heads, 2](
            batch.starts, batch.lengths, batch.tail_slots, *layer_tail.codes, *layer_tail.scales, *codes, *scales,
            layer_tail.ring, room, D=head_dim, WIDTH=shape["WIDTH"], num_warps=4, **configs.EXACT,
        )  # fmt: skip
    own = (None, None, None, None) if in_place else (*tail.codes, *tail.scales)
    store_rows[triton.cdiv(rows, shape["ROWS"]), 2](
        k, v, means(mean), batch.lengths, None, None, batch.starts, batch.tail_slots,
        *layer_tail.codes, *layer_tail.scales, *own, flag,
        rows, heads, None, batch.sequences, batch.bisections, layer_tail.ring, tail.room, None,
        None, *k.stride()[:2], None, *v.stride()[:2], ROTATE=config.rotate, PAGED=True, **shape,
    )  # fmt: skip
    blocks = batch.sequences + (0 if in_place else batch.tokens // BLOCK)
    fill_pages[blocks, 2, heads](
        *tail.codes, *tail.scales, all_page_offsets(layout, k.device), None,
        batch.lengths, batch.starts, batch.tail_slots, batch.table, pages,
        layer_tail.ring, batch.sequences, batch.bisections, tail.room, batch.table.stride(0), pages.stride(0),
        SEARCH=config.search, RING=in_place, PAGED=True, **layout_facts(layout),
    )  # fmt: skip
    return tail


def attend(
    config: TurboConfig,
    layout: PageLayout,
    batch: Ragged,
    q: Tensor,
    out: Tensor,
    mean: Tensor | None,
    pages: Tensor,
    layer_tail: LayerTail,
    tail: StepTail,
    flag: Tensor,
    params: AttentionParams,
) -> None:
    """Causal attention of q [T, Hq, D] over pages and tail rows, which include this step's tokens; writes out, shaped
    like q, with last stride 1. Arguments as for `store`. Raises DtypeError."""
    heads, valid = layout.num_kv_heads, batch.starts[-1:]
    # Without a softcap the mean's part is the same for all keys of a row.
    seen = mean[None] if mean is not None and params.softcap is not None else None
    quantized, _ = quantize_queries(q.transpose(0, 1)[None], heads, valid, seen, params.scale, config.rotate, flag=flag)
    x = with_positive_unit(quantized, params.scale)
    group = q.shape[1] // heads
    few = max(configs.LARGEST_DECODE_ROWS, group)
    arguments = {
        **query_arguments(x),
        "starts": batch.starts, "lengths": batch.lengths, "tail_slots": batch.tail_slots,
        "table": batch.table, "table_stride": batch.table.stride(0), "pages": pages, "page_stride": pages.stride(0),
        "k8": tail.codes[0], "v8": tail.codes[1], "k_scales": tail.scales[0], "v_scales": tail.scales[1],
        "ring": layer_tail.ring, "room": tail.room, "RING": tail.in_place,
        "kv_heads": heads, "group": group, "tokens": batch.tokens, "most": few,
        "D": layout.head_dim, "WIDE": padded(layout.head_dim),
        "BY_TOKEN": layout.token_scales,
        **softmax_arguments(config, q.device, params),
    }  # fmt: skip
    _decode_rows(config, layout, batch, out, arguments, params.softcap is not None)
    if batch.most * group > few:
        _prefill_rows(config, layout, batch, out, arguments)


def _decode_rows(
    config: TurboConfig, layout: PageLayout, batch: Ragged, out: Tensor, arguments: dict[str, Any], softcap: bool
) -> None:
    device, heads, wide = out.device, layout.num_kv_heads, arguments["WIDE"]
    architecture = configs.architecture_of(device)
    group, few = arguments["group"], arguments["most"]
    rows = min(batch.most * group, few)
    # If one sequence has too many rows for this kernel, (nearly) all others have one token each.
    usual = rows if batch.most * group <= few else group
    widths = widths_of(layout)
    launch = configs.decode(architecture, usual, layout.head_dim, softcap, len(widths) > 1)
    tiles = -(-rows // launch.rows)
    programs = batch.sequences * heads * -(-usual // launch.rows)
    splits = configs.splits(batch.table.shape[1], programs, configs.resident(launch, wide, widths, device))
    shape = batch.sequences, heads, tiles, splits, launch.rows
    acc = torch.empty(*shape, wide, dtype=torch.float32, device=device)
    row_max, row_sum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    paged_decode[splits, heads * tiles, batch.sequences](
        **arguments, page_offsets_ptr=all_page_offsets(layout, device), acc_ptr=acc, row_max_ptr=row_max,
        row_sum_ptr=row_sum, tiles=tiles, R=launch.rows, PAIRS=pairs_mask(layout), ASM=architecture.assembly,
        **launch.options,
    )  # fmt: skip
    combine[rows, heads, batch.sequences](
        acc, row_max, row_sum, out, None, batch.starts, splits, tiles, group, None, few, *out.stride()[:2],
        D=layout.head_dim, WIDE=wide, R=launch.rows, SPLITS=triton.next_power_of_2(splits),
        ROTATE=config.rotate, num_warps=1, **configs.FUSION,
    )  # fmt: skip


def _prefill_rows(
    config: TurboConfig, layout: PageLayout, batch: Ragged, out: Tensor, arguments: dict[str, Any]
) -> None:
    architecture = configs.architecture_of(out.device)
    as_read = configs.paged_prefill(architecture, layout.head_dim)
    parts = [(as_read, widths, heads, False) for widths, heads in pairs_of_widths(layout)]
    # Restoring in memory pays off for sequences of three programs or more.
    least, pages = 2 * as_read.rows, NOTHING_RESTORED
    if architecture.restores_pages and batch.most * arguments["group"] > least:
        pages = restored(layout, batch.sequences, least, architecture.assembly, arguments)
        launch = configs.restored_prefill(architecture, layout.head_dim)
        parts.append((launch, (8, 8), tuple(range(layout.num_kv_heads)), True))
    for launch, (k_bits, v_bits), heads, in_memory in parts:
        tiles = batch.tokens * arguments["group"] // launch.rows + batch.sequences
        paged_prefill[tiles, len(heads)](
            **arguments, **pages, page_offsets_ptr=head_page_offsets(layout, heads, out.device), out_ptr=out,
            out_stride_t=out.stride(0), out_stride_h=out.stride(1),
            sequences=batch.sequences, bisections=batch.bisections,
            M=launch.rows, K_BITS=k_bits, V_BITS=v_bits, ROTATE=config.rotate, SLOW=architecture.slow_int_to_float,
            ASM=architecture.assembly, RESTORED=in_memory, **launch.options,
        )  # fmt: skip
