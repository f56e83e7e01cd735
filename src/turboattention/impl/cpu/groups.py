"""Groups the sequences of a step into calls of the CPU kernels, once for all layers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.cpu.paged import FlatRows, TailSlots
from ...kv.paged import BLOCK, PagedBatch, TailBlocks

Counts = TypeVar("Counts", int, np.ndarray)


@dataclass(frozen=True)
class Group:
    """Sequences with equally many new tokens, which are all stored in their slots, or all in temporary memory.

    rows: their rows of q, k and v. slots: int64 [B]. offsets: int64 [B, P], byte offsets of their pages. filled: int64
    [B, F], those of the blocks that the step fills, -1 after the last of a sequence, or None if none fills. first:
    int64 [B], the first row of each slot. in_place: whether new tokens fit in the slots. used: smallest and largest
    page and slot number that the kernels access.
    """

    rows: FlatRows
    slots: Tensor
    offsets: Tensor
    filled: Tensor | None
    first: Tensor
    in_place: bool
    used: dict[str, tuple[int, int]]

    def check(self, pages: int, slots: int) -> None:
        """Raise InputError if a page or slot number is out of range: kernels write to these."""
        for (name, (least, greatest)), count in zip(self.used.items(), (pages, slots), strict=True):
            if least < 0 or greatest >= count:
                raise InputError(f"{name}: expected numbers from 0 to {count - 1}, got {least} to {greatest}")

    def fresh(self, base: int) -> Tensor | None:
        """The addresses of `filled` (`kernels.cpu.store.Store.fill_blocks`); base: address of page 0."""
        return None if self.filled is None else torch.where(self.filled < 0, 0, self.filled + base)

    def tail_rows(self, pool: TailBlocks, layer: int) -> TailSlots:
        """The INT8 rows from the first block that the step extends: the slots, or temporary memory with copies of their
        rows in that block."""
        codes, scales = pool.of(layer)
        if self.in_place:
            return TailSlots(codes, scales, self.rows.tail_start, self.first, pool.ring, pool.ring)
        before, (heads, _, head_dim) = self.rows.before, codes[0].shape[1:]
        width = int(((self.rows.after + BLOCK - 1) // BLOCK - before // BLOCK).max()) * BLOCK
        shape = len(before), heads, width
        tail = torch.empty(*shape, head_dim, dtype=torch.int8), torch.empty(*shape, head_dim, dtype=torch.int8)
        tail_scales = torch.empty(shape), torch.empty(shape)
        for row, (slot, position) in enumerate(zip(self.slots.tolist(), before.tolist(), strict=True)):
            held, first = position % BLOCK, position // BLOCK * BLOCK % pool.ring
            for side in range(2):
                tail[side][row, :, :held] = codes[side][slot, :, first : first + held]
                tail_scales[side][row, :, :held] = scales[side][slot, :, first : first + held]
        first = torch.arange(len(before)) * (heads * width)
        return TailSlots(tail, tail_scales, self.rows.tail_start, first, width, 0)

    def keep_last(self, pool: TailBlocks, layer: int, tail: TailSlots) -> None:
        """Copy the incomplete block of each sequence from temporary memory to its slot.

        With a ring of two blocks, the full block before it is copied too, since rejected tokens may reopen it.
        """
        if self.in_place:
            return
        codes, scales = pool.of(layer)
        for row, (slot, position) in enumerate(zip(self.slots.tolist(), self.rows.before.tolist(), strict=True)):
            start, end = position // BLOCK * BLOCK, position + self.rows.tokens
            kept = np.arange(max(start, end // BLOCK * BLOCK - (pool.ring - BLOCK)), end)
            rows, ring = torch.from_numpy(kept - start), torch.from_numpy(kept % pool.ring)
            for side in range(2):
                codes[side][slot, :, ring] = tail.codes[side][row, :, rows]
                scales[side][slot, :, ring] = tail.scales[side][row, :, rows]


def blocks_filled(held: Counts, tokens: Counts) -> Counts:
    """Blocks of a sequence that `tokens` more tokens fill, after `held` tokens that are not in pages."""
    return (held + tokens) // BLOCK


def grouped(batch: PagedBatch, slot_rows: int, ring: int, page_stride: int) -> list[Group]:
    """The groups of a step.

    slot_rows: rows of a slot over all heads; ring: rows of a slot per head; page_stride: bytes between pages.

    Sequences with the same number of new tokens share a call, so a sequence's result does not depend on the others in
    the batch. Uses NumPy, which has less overhead than PyTorch for small arrays.

    Raises:
        InputError: a length is below the number of the step's tokens, or exceeds the block table.
    """
    start, lengths = _int64(batch.query_start), _int64(batch.seq_lens)
    counts = np.diff(start)
    before = lengths - counts
    if (counts < 0).any() or (before < 0).any():
        raise InputError(
            f"seq_lens: expected at least the tokens of the step, got {lengths.tolist()} for {counts.tolist()}"
        )
    columns = batch.block_table.shape[1]
    if (lengths > columns * BLOCK).any():
        raise InputError(
            f"block_table: expected a column for each block of up to {lengths.max()} tokens, got {columns}"
        )
    # A ring of one block holds tokens that stay in one block; a ring of two, up to one block of new tokens.
    held = before % BLOCK
    fits = counts <= BLOCK if ring > BLOCK else held + counts <= BLOCK
    fills = blocks_filled(held, counts)
    members: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(counts.tolist(), fits.tolist(), strict=True)):
        members[key].append(row)
    slots, table, groups = _int64(batch.tail_slots), batch.block_table.numpy(), []
    for (count, in_place), at in members.items():
        if count:
            rows = FlatRows(count, *map(torch.from_numpy, (start[at], before[at])))
            last = -(-int(lengths[at].max()) // BLOCK)
            blocks = table[at, :last].astype(np.int64)
            offsets = blocks * page_stride
            # Columns past a sequence's pages are not checked.
            own = blocks[np.arange(last) * BLOCK < lengths[at, None]]
            used = {"block_table": _range(own), "tail_slots": _range(slots[at])}
            groups.append(
                Group(
                    rows,
                    slots=torch.from_numpy(slots[at]),
                    offsets=torch.from_numpy(offsets),
                    filled=_filled(offsets, before[at], fills[at]),
                    first=torch.from_numpy(slots[at] * slot_rows),
                    in_place=in_place,
                    used=used,
                )
            )
    return groups


def _filled(offsets: np.ndarray, before: np.ndarray, fills: np.ndarray) -> Tensor | None:
    """`Group.filled` of sequences with pages at `offsets` [B, P] and `before` [B] tokens, which fill `fills` [B]."""
    if not fills.any():
        return None
    column = np.arange(fills.max())
    past = column >= fills[:, None]
    at = np.where(past, 0, before[:, None] // BLOCK + column)
    return torch.from_numpy(np.where(past, -1, np.take_along_axis(offsets, at, 1)))


def _int64(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64)


def _range(x: np.ndarray) -> tuple[int, int]:
    return int(x.min()), int(x.max())
