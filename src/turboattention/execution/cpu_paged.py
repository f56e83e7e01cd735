"""Backend "cpu" over pages that a server manages (`turboattention.paged`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.cpu.paged import FlatRows, OpenRows, attend, store
from ..paged import BLOCK, OpenBlocks, PagedBatch, PagedFormat


def paged_attention(
    fmt: PagedFormat,
    layer: int,
    batch: PagedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pages: Tensor,
    open_blocks: OpenBlocks,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> bool:
    """`turboattention.paged.paged_attention`, arguments checked."""
    config, layout, mean = fmt.config, fmt.layouts[layer], fmt.stored_means[layer]
    base, stride = pages.data_ptr(), pages.stride(0)
    # Worked out once a step. Their first rows and pages are alike in layers whose pools and pages are.
    alike = layout.num_kv_heads * open_blocks.ring, open_blocks.ring, stride
    groups = batch.once(alike, lambda: _grouped(batch, *alike))
    for group in groups:
        group.check(len(pages), open_blocks.slots)
    parts, finite = [], True
    for group in groups:
        addresses = group.offsets + base
        opened = group.open_rows(open_blocks, layer, fields=(layout.num_kv_heads, layout.head_dim))
        parts.append((group, addresses, opened))
        if not store(config, layout, group.rows, k, v, mean, opened, addresses):
            finite, k, v = False, _cleaned(k), _cleaned(v)
            store(config, layout, group.rows, k, v, mean, opened, addresses)
        group.keep_last(open_blocks, layer, opened)
    for group, addresses, opened in parts:
        means = None if mean is None else mean.expand(len(group.slots), -1, -1).contiguous()
        options = {"scale": scale, "window": window, "softcap": softcap}
        finite &= attend(config, layout, group.rows, q, out, means, opened, addresses, **options)
    return finite


@dataclass(frozen=True)
class _Group:
    """Sequences that take equally many tokens, all of them in their slots, or all in memory of the step's own.

    offsets: int64 [B, P], their pages' places in bytes; first: int64 [B], their slots' first rows; used: the least and
    greatest number among their own pages, and among their slots.
    """

    rows: FlatRows
    slots: Tensor
    offsets: Tensor
    first: Tensor
    in_place: bool
    used: dict[str, tuple[int, int]]

    def check(self, pages: int, slots: int) -> None:
        """Kernels write where these say."""
        for (name, (least, greatest)), count in zip(self.used.items(), (pages, slots), strict=True):
            if least < 0 or greatest >= count:
                raise InputError(f"{name}: expected numbers from 0 to {count - 1}, got {least} to {greatest}")

    def open_rows(self, pool: OpenBlocks, layer: int, fields: tuple[int, int]) -> OpenRows:
        """Where the open blocks are from the first one that the step touches on, older rows in place."""
        heads, head_dim = fields
        if self.in_place:
            codes, scales = ((side[0][layer], side[1][layer]) for side in (pool.codes, pool.scales))
            return OpenRows(codes, scales, self.first, pool.ring, pool.ring)
        before = self.rows.before
        width = int(((self.rows.after + BLOCK - 1) // BLOCK - before // BLOCK).max()) * BLOCK
        shape = len(before), heads, width
        codes = torch.empty(*shape, head_dim, dtype=torch.int8), torch.empty(*shape, head_dim, dtype=torch.int8)
        scales = torch.empty(shape), torch.empty(shape)
        for row, (slot, position) in enumerate(zip(self.slots.tolist(), before.tolist(), strict=True)):
            held, first = position % BLOCK, position // BLOCK * BLOCK % pool.ring
            for side in range(2):
                codes[side][row, :, :held] = pool.codes[side][layer, slot, :, first : first + held]
                scales[side][row, :, :held] = pool.scales[side][layer, slot, :, first : first + held]
        return OpenRows(codes, scales, torch.arange(len(before)) * (heads * width), width, 0)

    def keep_last(self, pool: OpenBlocks, layer: int, opened: OpenRows) -> None:
        """The blocks left open into the slots."""
        if self.in_place:
            return
        before, tokens = self.rows.before.tolist(), self.rows.tokens
        for row, (slot, position) in enumerate(zip(self.slots.tolist(), before, strict=True)):
            end = position + tokens
            held, first = end % BLOCK, end // BLOCK * BLOCK
            at, to = first - position // BLOCK * BLOCK, first % pool.ring
            for side in range(2):
                kept = slice(at, at + held)
                pool.codes[side][layer, slot, :, to : to + held] = opened.codes[side][row, :, kept]
                pool.scales[side][layer, slot, :, to : to + held] = opened.scales[side][row, :, kept]


def _grouped(batch: PagedBatch, slot_rows: int, ring: int, page_stride: int) -> list[_Group]:
    """Sequences of equal counts share a call, so that who else is in a batch does not change what a sequence gets."""
    start, lengths = batch.query_start.to(torch.int64), batch.seq_lens.to(torch.int64)
    counts = start[1:] - start[:-1]
    before = lengths - counts
    if bool((counts < 0).any()) or bool((before < 0).any()):
        raise InputError(
            f"seq_lens: expected at least the tokens of the step, got {lengths.tolist()} for {counts.tolist()}"
        )
    if bool((lengths > batch.block_table.shape[1] * BLOCK).any()):
        raise InputError(
            f"block_table: expected a column for each block of up to {int(lengths.max())} tokens, got "
            f"{batch.block_table.shape[1]}"
        )
    # A ring of one block holds what stays in its block; a ring of two, what a step of up to a block adds.
    fits = counts <= BLOCK if ring > BLOCK else before % BLOCK + counts <= BLOCK
    rows: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(counts.tolist(), fits.tolist(), strict=True)):
        rows[key].append(row)
    groups = []
    for (count, in_place), members in rows.items():
        if count:
            at = torch.tensor(members)
            flat = FlatRows(count, start[at].contiguous(), before[at].contiguous())
            last = int((lengths[at].max() + BLOCK - 1) // BLOCK)
            slots, blocks = batch.slots[at].to(torch.int64), batch.block_table[at, :last].to(torch.int64)
            # Columns behind a sequence's own pages are not looked at.
            own = blocks[torch.arange(last) * BLOCK < lengths[at, None]]
            used = {"block_table": _range(own), "slots": _range(slots)}
            places = (blocks * page_stride).contiguous(), slots * slot_rows
            groups.append(_Group(flat, slots, *places, in_place, used))
    return groups


def _range(x: Tensor) -> tuple[int, int]:
    return int(x.min()), int(x.max())


def _cleaned(x: Tensor) -> Tensor:
    """What is not finite, or beyond 1e18, as zeros."""
    return torch.where(x.float().abs() <= 1e18, x, 0)
