"""Pages restored to INT8 in memory once per step, for sequences whose rows fill several programs of `paged_prefill`.

Blocks are numbered across these sequences: sequence b reads blocks `origins[b]` to `origins[b + 1]` (exclusive) as
pages, in order. There is memory for the first `capacity` blocks. The first sequence that exceeds it and all later ones
are computed by programs that restore pages as they read them. The device decides this, so the host does not need
lengths or page tables.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...kv.layout import PageLayout
from ..inputs import BLOCK
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS, all_page_offsets, section_offsets, widths_masks
from .ragged import sequence_at, span_of
from .restoring import page_keys, page_values
from .unpacked_kv import by_value_columns, token_scales
from .widths import K_NUMBERS, V_NUMBERS

RESTORED_BYTES = 1 << 28
"""Limit of the memory for restored pages."""

_PROGRAMS = 512
"""Programs per KV head: enough for all processors, and cheap to launch if there are no pages to restore."""

NOTHING_RESTORED = {
    **dict.fromkeys(["origins", "restored_k", "restored_v", "restored_k_scales", "restored_v_scales"]),
    "capacity": 0,
}
"""Arguments of `paged_prefill` if `restored` is not called."""


@triton.jit
def first_block(before, window, WINDOW: tl.constexpr):
    """The first block that is visible to rows at position `before` or later."""
    return tl.maximum(before - window + 1, 0) // 64 if WINDOW else before * 0


@triton.jit
def are_restored(origins, b, capacity):
    """Whether the pages of sequence b are restored; false if it reads no pages."""
    end = tl.load(origins + b + 1)
    return (end > tl.load(origins + b)) & (end <= capacity)


@triton.jit(do_not_specialize=["sequences", "group", "least", "window"])
def number_blocks(
    starts, lengths, origins, sequences, group, least, window, WINDOW: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """One program: origins int32 [R + 1]; sequences of at most `least` rows have no blocks."""
    b = tl.arange(0, SIZE)
    there = b < sequences
    start = tl.load(starts + b, mask=there, other=0).to(tl.int32)
    count = tl.load(starts + b + 1, mask=there, other=0).to(tl.int32) - start
    length = tl.load(lengths + b, mask=there, other=0).to(tl.int32)
    blocks = tl.maximum(length - 1, 0) // 64 - first_block(length - count, window, WINDOW)
    blocks = tl.where(count * group > least, blocks, 0)
    tl.store(origins, 0)
    tl.store(origins + 1 + b, tl.cumsum(blocks, 0), mask=there)


@triton.jit(do_not_specialize=["table_stride", "sequences", "bisections", "capacity", "window"])
def restore_pages(
    starts, lengths, table, table_stride, pages, page_stride, page_offsets_ptr, origins,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sequences, bisections, capacity, window,
    D: tl.constexpr, WIDE: tl.constexpr, K_WIDTHS: tl.constexpr, V_WIDTHS: tl.constexpr, BY_TOKEN: tl.constexpr,
    WINDOW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (any number, KV heads). K_WIDTHS, V_WIDTHS: `page_offsets.widths_masks`. K int8 [Hkv, capacity, 64, WIDE],
    channels as in `restoring.halves`; V^T int8 [Hkv, capacity, WIDE, 64], tokens as in `unpacked_kv.value_column`;
    undefined in octets past D; scales float32 [Hkv, capacity, 64]."""
    head_ptr = page_offsets_ptr + tl.program_id(1) * OFFSETS
    head = tl.program_id(1).to(tl.int64) * capacity
    k_bits = tl.load(head_ptr + OF_KEYS)
    v_bits = tl.load(head_ptr + OF_VALUES)
    k_offsets, v_offsets = section_offsets(head_ptr, D, D)
    t = tl.arange(0, 64)
    for i in tl.range(tl.program_id(0), tl.minimum(tl.load(origins + sequences), capacity), tl.num_programs(0)):
        b = sequence_at(origins, sequences, bisections, i, 1, 1, 0)
        if are_restored(origins, b, capacity):
            _, count, length = span_of(starts, lengths, b)
            block = first_block(length - count, window, WINDOW) + i - tl.load(origins + b)
            number = tl.load(table + b.to(tl.int64) * table_stride + block)
            page = tl.multiple_of(pages + number.to(tl.int64) * page_stride, 16)
            at = head + i
            # Of several widths the head's is chosen here, so that one launch restores all heads.
            for BITS in tl.static_range(K_NUMBERS):
                if K_WIDTHS == 1 << BITS:
                    _restore_keys(page, k_offsets, k_ptr + at * (64 * WIDE), WIDE, D, BITS, ASM)
                elif K_WIDTHS >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
                    if k_bits == BITS:
                        _restore_keys(page, k_offsets, k_ptr + at * (64 * WIDE), WIDE, D, BITS, ASM)
            for BITS in tl.static_range(V_NUMBERS):
                if V_WIDTHS == 1 << BITS:
                    _restore_values(page, v_offsets, v_ptr + at * (64 * WIDE), WIDE, D, BITS, ASM)
                elif V_WIDTHS >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
                    if v_bits == BITS:
                        _restore_values(page, v_offsets, v_ptr + at * (64 * WIDE), WIDE, D, BITS, ASM)
            tl.store(k_scale_ptr + at * 64 + t, token_scales(page, k_offsets, t, BY_TOKEN))
            tl.store(v_scale_ptr + at * 64 + t, token_scales(page, v_offsets, t, BY_TOKEN))


@triton.jit
def _restore_keys(
    page, offsets, to, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    k = page_keys(page, offsets, WIDE, D, BITS, ASM)
    tl.store(to + tl.arange(0, 64)[:, None] * WIDE + tl.arange(0, WIDE)[None, :], k)


@triton.jit
def _restore_values(
    page, offsets, to, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    v = page_values(page, offsets, 0, WIDE, D, BITS, ASM)
    tl.store(to + tl.arange(0, WIDE)[:, None] * 64 + tl.arange(0, 64)[None, :], by_value_columns(v))


def restored(
    layout: PageLayout, sequences: int, least: int, assembly: str, arguments: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Launch both kernels for sequences of more than `least` rows. arguments: those of `paged_prefill`. Returns the
    further arguments of `paged_prefill`."""
    table, heads, wide = arguments["table"], layout.num_kv_heads, arguments["WIDE"]
    device, bisections = table.device, sequences.bit_length()
    capacity = max(1, min(sequences * table.shape[1], RESTORED_BYTES // (heads * bytes_per_block(wide))))
    k, v = (torch.empty(heads, capacity, BLOCK, wide, dtype=torch.int8, device=device) for _ in range(2))
    k_scales, v_scales = (torch.empty(heads, capacity, BLOCK, dtype=torch.float32, device=device) for _ in range(2))
    origins = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    common = {name: arguments[name] for name in ("starts", "lengths", "window", "WINDOW")}
    size = triton.next_power_of_2(sequences)
    number_blocks[(1,)](
        **common, origins=origins, sequences=sequences, group=arguments["group"], least=least, SIZE=size
    )
    common |= {name: arguments[name] for name in ("table", "table_stride", "pages", "page_stride")}
    common |= {name: arguments[name] for name in ("D", "WIDE", "BY_TOKEN")}
    restore_pages[min(capacity, _PROGRAMS), heads](
        **common, **widths_masks(layout), page_offsets_ptr=all_page_offsets(layout, device), origins=origins, k_ptr=k,
        v_ptr=v, k_scale_ptr=k_scales, v_scale_ptr=v_scales, sequences=sequences, bisections=bisections,
        capacity=capacity, ASM=assembly,
    )  # fmt: skip
    return {
        "origins": origins, "restored_k": k, "restored_v": v, "restored_k_scales": k_scales,
        "restored_v_scales": v_scales, "capacity": capacity,
    }  # fmt: skip


def bytes_per_block(wide: int) -> int:
    """Bytes of one restored block of a KV head."""
    return BLOCK * (2 * wide + 4 + 4)
