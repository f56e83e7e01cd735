"""Backend "cpu" over pages that a server manages (`turboattention.paged`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..flashq import rotate
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
    mean: Tensor | None,
) -> bool:
    """`turboattention.paged.paged_attention`, arguments checked."""
    config, layout = fmt.config, fmt.layouts[layer]
    if mean is not None:
        mean = rotate(mean.float()) if config.rotate else mean.float()
        mean = mean.contiguous()
    base, stride = pages.data_ptr(), pages.stride(0)
    parts, finite, groups = [], True, _groups(batch, open_blocks.ring)
    for group in groups:
        group.check(len(pages), open_blocks.slots)
    for group in groups:
        addresses = group.blocks * stride + base
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
    """Sequences that take equally many tokens, all of them in their slots, or all in memory of the step's own."""

    rows: FlatRows
    slots: Tensor
    blocks: Tensor
    in_place: bool

    def check(self, pages: int, slots: int) -> None:
        """Kernels write where these say. Columns behind a sequence's own pages are not looked at."""
        own = torch.arange(self.blocks.shape[1]) * BLOCK < (self.rows.before + self.rows.tokens)[:, None]
        for name, x, count in (("block_table", self.blocks[own], pages), ("slots", self.slots, slots)):
            if bool(((x < 0) | (x >= count)).any()):
                raise InputError(f"{name}: expected numbers from 0 to {count - 1}, got {x.min()} to {x.max()}")

    def open_rows(self, pool: OpenBlocks, layer: int, fields: tuple[int, int]) -> OpenRows:
        """Where the open blocks are from the first one that the step touches on, older rows in place."""
        heads, head_dim = fields
        if self.in_place:
            codes, scales = ((side[0][layer], side[1][layer]) for side in (pool.codes, pool.scales))
            return OpenRows(codes, scales, self.slots * (heads * pool.ring), pool.ring, pool.ring)
        before, after = self.rows.before, self.rows.before + self.rows.tokens
        width = int(((after + BLOCK - 1) // BLOCK - before // BLOCK).max()) * BLOCK
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


def _groups(batch: PagedBatch, ring: int) -> list[_Group]:
    """Worked out once a step. Sequences of equal counts share a call, so that who else is in a batch does not
    change what a sequence gets."""
    if "cpu" not in batch.plan:
        batch.plan["cpu"] = _grouped(batch, ring)
    return batch.plan["cpu"]


def _grouped(batch: PagedBatch, ring: int) -> list[_Group]:
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
            blocks = batch.block_table[at, :last].to(torch.int64).contiguous()
            groups.append(_Group(flat, batch.slots[at].to(torch.int64), blocks, in_place))
    return groups


def _cleaned(x: Tensor) -> Tensor:
    """What is not finite, or beyond 1e18, as zeros."""
    return torch.where(x.float().abs() <= 1e18, x, 0)
