"""Adds tokens to a `KVCache` in three steps: stage them as INT8, encode full blocks, commit.

Staging and encoding do not change the cache, and committing cannot fail because of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..modes import in_own_modes
from ..validation import check_new, refuse_gradients
from .channel_order import ChannelOrder, channel_order
from .contents import Contents
from .quantizer import quantizer_for
from .staging import Stage, stage
from .store import CROPPED, Encoded, Flush
from .widths import decide_head_bits, uniform_head_bits


class Growing(Contents):
    """The part of `KVCache` that stores new tokens."""

    @in_own_modes
    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Quantize and store new tokens.

        Args:
            k: [B, Hkv, T, D], v: [B, Hkv, T, Dv], one floating dtype, on the cache's device.
            lengths: int64 [B], how many of the T tokens to append to each sequence (left-aligned); default all.
                The remaining tokens are not read.

        Raises:
            ShapeError, DtypeError, InputError, NonFiniteError, UnsupportedError (inputs that
            require gradients); the cache is then unchanged.
        """
        if torch.compiler.is_dynamo_compiling():
            refuse_gradients(k=k, v=v)
            torch.ops.turboattention.append(self._handle, k, v, lengths)
            return
        counts = check_new(self.token_shape, self.device, k, v, lengths, finite=False)
        if quantizer_for(k.device, k.dtype).append(self, k, v, None if lengths is None else counts):
            return
        self.commit(self.stage(k, v, lengths))

    @in_own_modes
    def stage(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        names: tuple[str, str] = ("k", "v"),
        query_energy: Tensor | None = None,
    ) -> Stage:
        """Check new tokens and quantize them to INT8, without adding them to the cache.

        k, v, lengths, errors: as in `append`. names: of k and v in error messages. query_energy: float64 [Hkv, D] of
        the queries of this call (`channel_order`).
        """
        counts = check_new(self.token_shape, self.device, k, v, lengths, names)
        self.look()
        self._allocate(k.device)
        if self.dtype is None:
            self.dtype = k.dtype
        staged = stage(self.config, self.state(k.device), k, v, counts)
        return replace(staged, query_energy=_sum(self._query_energy, query_energy))

    @in_own_modes
    def commit(self, staged: Stage, head_bits: Tensor | None = None) -> None:
        """Store staged tokens; `head_bits` int64 [2, Hkv] overrides widths that are not frozen yet."""
        assert self._store is not None and self._buffer is not None
        self.kept = None
        flush, bits = self.pending_flush(staged), head_bits
        if bits is None and self.freezes_widths(flush):
            bits = self.planned_bits(staged, flush)
        first = self._first_kept(staged.lengths)
        seen = flush.block >= first[flush.batch]
        order = self.planned_order(staged, flush)
        parts = self.encode(flush.where(seen), bits, order)
        if bits is not None and self._store.head_bits is None:
            self.freeze_widths(bits, order)
        self._store.append(parts, first.tolist(), flush.batch[~seen].tolist())
        kept = torch.bincount(flush.batch, minlength=self.batch_size) * self.config.block_size
        self._buffer.take(staged.stored, kept, staged.lengths - staged.start - kept, self._seen(staged.lengths))
        self._lengths = staged.lengths.clone()
        self._k_mean, self._universal = _single(staged.k_mean), _single(staged.universal)
        self._query_energy = staged.query_energy if self.learns_order else None

    def observe(self, query_energy: Tensor) -> None:
        """Add `query_energy` float64 [Hkv, D] of a call that does not commit; used until K's order is fixed."""
        self._query_energy = _sum(self._query_energy, query_energy)

    def pending_flush(self, staged: Stage) -> Flush:
        """The blocks of a stage to compress: full, and followed by at least `flush_lag` tokens."""
        size, tiles = self.config.block_size, staged.stored
        full = (staged.lengths - staged.start - self.config.flush_lag).clamp(min=0) // size
        width = tiles.k8.shape[2] // size
        batch, block = (torch.arange(width) < full[:, None]).nonzero(as_tuple=True)
        at = batch.to(tiles.k8.device), slice(None), block.to(tiles.k8.device)
        picked = tiles.map(lambda x: x.unflatten(2, (width, size))[at])
        single = replace(picked, k_scale=picked.k_scale.float(), v_scale=picked.v_scale.float())
        return Flush(batch, block + staged.start[batch] // size, single)

    def freezes_widths(self, flush: Flush) -> bool:
        """Whether these blocks contain the cache's first block after the sinks."""
        frozen = self._store is not None and self._store.head_bits is not None
        return not frozen and bool((flush.block >= self.sink_blocks).any())

    @property
    def known_bits(self) -> Tensor | None:
        """int64 [2, Hkv]: the widths that will be frozen; None if widths or K's order depend on the tokens."""
        if self.learns_order:
            return None
        return self._given_bits if self._given_bits is not None else uniform_head_bits(self.config, self.num_kv_heads)

    @property
    def learns_order(self) -> bool:
        """Whether the order of K's channels is not fixed yet."""
        return self.config.reorders_k and (self._store is None or self._store.order is None)

    @property
    def order_from(self) -> int:
        """Queries before this position determine the order of K's channels: the end of the first compressed block."""
        return (self.sink_blocks + 1) * self.config.block_size

    def planned_order(self, staged: Stage, flush: Flush) -> ChannelOrder | None:
        """The order of K's channels that `commit` would fix, or None."""
        if not self.learns_order or not self.freezes_widths(flush):
            return None
        first = flush.where(flush.block == self.sink_blocks)
        return channel_order(self.restore(first.tiles.floats()[0]), staged.query_energy)

    def freeze_widths(self, head_bits: Tensor, order: ChannelOrder | None = None) -> None:
        """Fix the widths int64 [2, Hkv] of all pages after the sinks and the order of K's channels, and reserve memory
        for `max_tokens`."""
        assert self._store is not None
        self._store.freeze(head_bits, order)
        self._reserve()

    def planned_bits(self, staged: Stage, flush: Flush) -> Tensor:
        """int64 [2, Hkv]: the widths that `commit` would freeze."""
        if self._given_bits is not None:
            return self._given_bits
        first = flush.where(flush.block == self.sink_blocks)
        k, v = first.tiles.floats()
        if staged.k_mean is not None and (self.sink_blocks > 0 or self._given_mean is not None):
            k = k + staged.k_mean.to(k.dtype)[first.batch.to(k.device)][:, :, None]
        return decide_head_bits(self.config, self.restore(k), self.restore(v))

    def encode(self, flush: Flush, head_bits: Tensor | None, order: ChannelOrder | None = None) -> list[Encoded]:
        """Encode full blocks; `head_bits` int64 [2, Hkv] and `order` are used if they are not fixed yet."""
        assert self._store is not None
        bits = self._store.head_bits if self._store.head_bits is not None else head_bits
        return self._store.encode(flush, bits, order)

    @property
    def learns_mean(self) -> bool:
        """Whether the mean of K is computed from each sequence's first block."""
        return self.config.smooth_k and self._given_mean is None

    @property
    def room(self) -> int:
        """Tokens that can be added to every sequence before its buffer is full, or before the first block fills, from
        which the mean of K is computed. 0 before the first tokens."""
        if self._buffer is None or not self.batch_size:
            return 0
        size = self.config.block_size
        left = self._buffer.capacity - (self._lengths - self.page_counts * size)
        if self.learns_mean:
            left = torch.where(self._lengths < size, torch.minimum(left, size - 1 - self._lengths), left)
        return int(left.min())

    def buffer_rows(self, tokens: int) -> int:
        """Rows of the buffer for at most `tokens` buffered tokens per sequence."""
        assert self._buffer is not None
        return self._buffer.rows_for(tokens, self._seen(self._lengths))

    @in_own_modes
    def buffer_memory(self, rows: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The buffer's codes int8 [B, H, rows, D] and scales [B, H, rows] of K and V, contiguous.

        The caller writes new rows after the existing ones and then calls `extend`. `rows` must hold the existing rows.
        """
        assert self._buffer is not None
        k8, v8, k_scale, v_scale = self._buffer.memory(rows)
        return (k8, v8), (k_scale, v_scale)

    @in_own_modes
    def extend(
        self,
        tokens: int | Tensor,
        filled: Sequence[int] = (),
        pages: Sequence[int] = (),
        k_mean: Tensor | None = None,
    ) -> None:
        """Add rows that the caller wrote to the buffer to the sequences' lengths. Only with token scales.

        tokens: per sequence, int64 [B] (CPU) or one int for all; at most `room`, except in sequences that filled a
        block. filled, pages: those sequences, and the page (`fresh_pages` of the store) into which the caller
        compressed each one's block; the buffer holds the rows after it. k_mean: float32 [B, H, D], the new mean if
        first blocks filled and it is not calibrated. If the cache is not `settled`, the caller has frozen the widths.
        """
        assert self._store is not None
        if filled:
            self._store.adopt(filled, pages)
        if k_mean is not None:
            self._k_mean = k_mean
        self._lengths = self._lengths + tokens
        if self.window_size is not None:
            self._store.evict(self._first_kept(self._lengths).tolist())

    @property
    def settled(self) -> bool:
        """Whether the next block of every sequence can be compressed without decisions: widths and means are fixed, and
        all sink blocks are pages."""
        frozen = self._store is not None and self._store.head_bits is not None
        if not frozen or not len(self._lengths):
            return False
        past_sinks = int(self.page_counts.min()) >= self.sink_blocks
        return past_sinks and int(self._lengths.min()) >= self.config.block_size

    def _reserve(self) -> None:
        assert self._store is not None
        if self._store.head_bits is not None:
            self._store.reserve(self.max_tokens or 0, self.window_size)

    def _first_kept(self, lengths: Tensor) -> Tensor:
        """int64 [B]: the first block that a later query can see, for sequences of `lengths` tokens."""
        if self.window_size is None:
            return torch.zeros_like(lengths)
        # The next query has position L and sees positions from L - window + 1 on; after a crop, earlier ones.
        return ((lengths - self.window_size + 1 - CROPPED) // self.config.block_size).clamp(min=0)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y.to(x.device)


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
