"""`KVCache`: sequences as compressed pages with an INT8 buffer behind them, and how they change."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import InputError, ShapeError
from ..flashq import rotate
from ..validation import check_config, check_mean, check_new, check_sizes, refuse_gradients
from .buffer import Int8Buffer
from .cropping import check_crop, rows_behind
from .handle import leave_graph, new_handle
from .pages import Tiles
from .staging import SequenceState, Stage, fresh_state, stage
from .store import Encoded, Flush, PageStore
from .widths import HeadBits, decide_head_bits, parse_head_bits


class KVCache:
    """Quantized keys and values of `batch_size` sequences (the format is in kv/layout.py).

    The first `config.sink_tokens` of a sequence are pages of INT8, then follow pages of 2 to 8 bits
    a head, then an INT8 buffer of fewer than `block_size + flush_lag` tokens.

    Args:
        batch_size, num_kv_heads, head_dim: at least 0, at least 1, a multiple of 8 up to 256.
        config: `TurboConfig()` by default.
        head_bits: widths per KV head, [Hkv] or [2, Hkv] (K, V). Without them they follow
            `config.bits`, decided when the first block is compressed and frozen from then on.
        max_tokens: tokens per sequence to reserve memory for; more may be appended.
        device, dtype: where the cache lives, and what `dequantize` returns; by default those of
            the first tokens appended.
        window_size: for sliding-window layers. Blocks that no later query can see are released,
            one block late, so that a crop of up to `block_size` tokens stays possible.
        k_mean: float [Hkv, D], a calibrated mean of K for smoothing; by default it is taken from
            each sequence's first block.

    Raises:
        ConfigError, ShapeError, DtypeError for arguments out of range.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        config: TurboConfig | None = None,
        head_bits: HeadBits | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window_size: int | None = None,
        k_mean: Tensor | None = None,
    ):
        check_sizes(batch_size, num_kv_heads, head_dim, max_tokens, window_size, dtype)
        self.config = check_config(config)
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.window_size, self.max_tokens, self.dtype = window_size, max_tokens, dtype
        self.label: str | None = None
        """How messages name this cache, such as "layer 3"."""
        self._given_bits = parse_head_bits(head_bits, num_kv_heads)
        self._given_mean = check_mean(k_mean, self.config, num_kv_heads, head_dim)
        self._lengths = torch.zeros(batch_size, dtype=torch.int64)
        self._handle = new_handle(self)
        # Memory, made once the device is known: pages, buffer, and per-sequence state of stage 1.
        self._store: PageStore | None = None
        self._buffer: Int8Buffer | None = None
        self._k_mean: Tensor | None = None
        self._universal: Tensor | None = None
        self.kept: Any = None
        """What a backend keeps from step to step; forgotten when pages, buffer or sequences change."""
        if device is not None:
            self._allocate(torch.device(device))

    # -- what it holds ------------------------------------------------------------------------

    def __len__(self) -> int:
        """The longest sequence's tokens."""
        leave_graph()
        return int(self._lengths.max()) if len(self._lengths) else 0

    def __repr__(self) -> str:
        return (
            f"KVCache(batch_size={self.batch_size}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"tokens={len(self)}, bits={self.config.bits!r}, nbytes={self.nbytes})"
        )

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def seq_lens(self) -> Tensor:
        """int64 [B] on the CPU: tokens of each sequence, evicted ones included."""
        if torch.compiler.is_dynamo_compiling():  # what is here while tracing is old when the graph runs
            return torch.ops.turboattention.seq_lens(self._handle, len(self._lengths))
        return self._lengths.clone()

    @property
    def lengths(self) -> Tensor:
        """`seq_lens` without the copy: replaced, never changed, when tokens are added."""
        return self._lengths

    @property
    def handle(self) -> Tensor:
        """int64 [1] on the CPU that stands for this cache in compiled graphs (kv/handle.py)."""
        return self._handle

    @property
    def device(self) -> torch.device | None:
        """None until the constructor or the first tokens fix it."""
        leave_graph()
        return self._store.device if self._store is not None else None

    @property
    def head_bits(self) -> Tensor | None:
        """int64 [2, Hkv], widths of K and V; None until given or frozen."""
        leave_graph()
        frozen = self._store.head_bits if self._store is not None else None
        bits = frozen if frozen is not None else self._given_bits
        return None if bits is None else bits.clone()

    @property
    def widths_given(self) -> bool:
        """Whether the user fixed the widths (`head_bits`)."""
        return self._given_bits is not None

    @property
    def sink_blocks(self) -> int:
        """Blocks at the start of each sequence that stay INT8."""
        return self.config.sink_tokens // self.config.block_size

    @property
    def mean_from(self) -> int:
        """First position whose key is stored without the mean of K (with `smooth_k`)."""
        return 0 if self._given_mean is not None else self.config.block_size

    @property
    def nbytes(self) -> int:
        """Every byte of tensors: pages (used and free), buffer, means, scales, widths, lengths, handle.

        Pages that clones share are counted by each of them.
        """
        leave_graph()
        given = (self._given_bits, self._given_mean)
        parts = (self._store, self._buffer, self._k_mean, self._universal, self._lengths, self._handle, *given)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_element(self) -> float:
        """`nbytes * 8 / (2 * sum(seq_lens) * Hkv * D)`; infinite while empty."""
        elements = 2 * int(self._lengths.sum()) * self.num_kv_heads * self.head_dim
        return self.nbytes * 8 / elements if elements else float("inf")

    # -- adding tokens: stage and compress change nothing, commit cannot fail on input ---------------

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Quantize and store new tokens.

        Args:
            k, v: [B, Hkv, T, D], one floating dtype, on the cache's device.
            lengths: int64 [B], how many of the T tokens each sequence takes (left-aligned); by
                default all. What stands behind them is never read.

        Raises:
            ShapeError, DtypeError, InputError, NonFiniteError, UnsupportedError (inputs that
            require gradients); the cache is then unchanged.
        """
        if torch.compiler.is_dynamo_compiling():
            refuse_gradients(k=k, v=v)
            torch.ops.turboattention.append(self._handle, k, v, lengths)
            return
        self.commit(self.stage(k, v, lengths))

    def stage(self, k: Tensor, v: Tensor, lengths: Tensor | None = None, names: tuple[str, str] = ("k", "v")) -> Stage:
        """Check new tokens (called by `names` in messages) and quantize them to INT8, without
        changing the cache."""
        shape = (self.batch_size, self.num_kv_heads, self.head_dim)
        counts = check_new(shape, self.device, k, v, lengths, names)
        self._allocate(k.device)
        if self.dtype is None:
            self.dtype = k.dtype
        return stage(self.config, self.state(k.device), k, v, counts)

    def commit(self, staged: Stage, head_bits: Tensor | None = None) -> None:
        """Store what `stage` gave; `head_bits` int64 [2, Hkv] overrides widths not frozen yet."""
        assert self._store is not None and self._buffer is not None
        self.kept = None
        if self._fills_one_block_each(staged):
            # What follows below, and nothing that it has to look for: most flushes are these.
            self._store.append_blocks(staged.stored)
            self._buffer.clear()
            self._lengths = staged.lengths.clone()
            self._evict()
            return
        flush, bits = self.pending_flush(staged), head_bits
        if bits is None and self.freezes_widths(flush):
            bits = self.planned_bits(staged, flush)
        parts = self.encode(flush, bits)
        if bits is not None and self._store.head_bits is None:
            self._store.freeze(bits)
            self._store.reserve(self.max_tokens or 0)
        self._store.append(parts)
        kept = torch.bincount(flush.batch, minlength=self.batch_size) * self.config.block_size
        self._buffer.take(staged.stored, kept, staged.lengths - staged.start - kept)
        self._lengths = staged.lengths.clone()
        self._k_mean, self._universal = _single(staged.k_mean), _single(staged.universal)
        self._evict()

    def _fills_one_block_each(self, staged: Stage) -> bool:
        """Whether every sequence ends at a block's end, one block further, behind all decisions."""
        size = self.config.block_size
        if not self.settled or self.config.flush_lag or not self.config.token_scales:
            return False
        if staged.stored.k8.shape[2] != size or staged.stored.k_scale.dtype != torch.float32:
            return False
        behind_sinks = int(staged.start.min()) >= self.config.sink_tokens
        return behind_sinks and bool((staged.lengths - staged.start == size).all())

    def pending_flush(self, staged: Stage) -> Flush:
        """The blocks of a stage that are full, and `flush_lag` tokens old, and become pages."""
        size, tiles = self.config.block_size, staged.stored
        full = (staged.lengths - staged.start - self.config.flush_lag).clamp(min=0) // size
        width = tiles.k8.shape[2] // size
        batch, block = (torch.arange(width) < full[:, None]).nonzero(as_tuple=True)
        at = batch.to(tiles.k8.device), slice(None), block.to(tiles.k8.device)
        picked = tiles.map(lambda x: x.unflatten(2, (width, size))[at])
        single = replace(picked, k_scale=picked.k_scale.float(), v_scale=picked.v_scale.float())
        return Flush(batch, block + staged.start[batch] // size, single)

    def freezes_widths(self, flush: Flush) -> bool:
        """Whether these blocks hold the cache's first one behind the sinks."""
        frozen = self._store is not None and self._store.head_bits is not None
        return not frozen and bool((flush.block >= self.sink_blocks).any())

    def planned_bits(self, staged: Stage, flush: Flush) -> Tensor:
        """int64 [2, Hkv]: the widths that committing would freeze."""
        if self._given_bits is not None:
            return self._given_bits
        first = flush.where(flush.block == self.sink_blocks)
        k, v = first.tiles.floats()
        if staged.k_mean is not None and (self.sink_blocks > 0 or self._given_mean is not None):
            k = k + staged.k_mean.to(k.dtype)[first.batch.to(k.device)][:, :, None]
        return decide_head_bits(self.config, self.restore(k), self.restore(v))

    def encode(self, flush: Flush, head_bits: Tensor | None) -> list[Encoded]:
        """The pages of full blocks; `head_bits` where widths are not frozen yet."""
        assert self._store is not None
        return self._store.encode(flush, self._store.head_bits if self._store.head_bits is not None else head_bits)

    @property
    def room(self) -> int:
        """Tokens that every sequence can take before something is decided or compressed: before the
        buffer is full, or its first block, which the mean of K is taken from. 0 before the first tokens."""
        if self._buffer is None or not self.batch_size:
            return 0
        size = self.config.block_size
        left = self._buffer.capacity - (self._lengths - self.page_counts * size)
        if self.config.smooth_k and self._given_mean is None:
            left = torch.where(self._lengths < size, torch.minimum(left, size - 1 - self._lengths), left)
        return int(left.min())

    def buffer_memory(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Codes int8 [B, H, capacity, D] and scales [B, H, capacity] of K and V, to write new rows into
        behind the old ones; `extend` then counts them."""
        assert self._buffer is not None
        b = self._buffer
        return (b.k8, b.v8), (b.k_scale, b.v_scale)

    def extend(self, tokens: int, rows: Tiles | None = None) -> None:
        """Count `tokens` rows that were written behind those of every sequence: at most `room`, or as many
        as fill a block, and then `rows` [B, H, W, D] (W in blocks) are what the buffer would hold.

        Only for caches of token scales; a block may fill only where `settled`.
        """
        assert self._store is not None and self._buffer is not None
        if rows is not None:
            after, start = self._lengths + tokens, self.page_counts * self.config.block_size
            self.commit(Stage(self._lengths, after, start, rows, rows, self._k_mean, None))
            return
        self._lengths = self._lengths + tokens
        self._evict()

    @property
    def settled(self) -> bool:
        """Whether a block that fills is compressed without any decision: widths and means are known."""
        frozen = self._store is not None and self._store.head_bits is not None
        return frozen and len(self._lengths) > 0 and int(self._lengths.min()) >= self.config.block_size

    # -- reading -----------------------------------------------------------------------------------

    def state(self, device: torch.device) -> SequenceState:
        """What stage 1 and attention read of the open blocks."""
        if self._store is None or self._buffer is None:
            empty = fresh_state(self.config, self.batch_size, self.num_kv_heads, self.head_dim, device)
            if self._given_mean is None:
                return empty
            return replace(empty, k_mean=self._stored_mean(device), k_mean_fixed=True)
        return SequenceState(
            lengths=self._lengths,
            start=self.page_counts * self.config.block_size,
            open_tiles=self._buffer.tiles(),
            k_mean=self._k_mean,
            k_mean_fixed=self._given_mean is not None,
            universal=self._universal,
        )

    @property
    def store(self) -> PageStore | None:
        """The pages, for kernels that read them in place; None before the first tokens."""
        return self._store

    @property
    def page_counts(self) -> Tensor:
        """int64 [B]: blocks of each sequence that are pages, evicted ones included."""
        leave_graph()
        return self._store.counts if self._store is not None else torch.zeros_like(self._lengths)

    def page_tiles(self, first: int, last: int) -> Tiles:
        """INT8 tiles [B, n, H, block, D] of blocks `first` to `last` (exclusive); scale 0 where no page is."""
        assert self._store is not None
        return self._store.tiles(first, last)

    def readable_pages(self, blocks: int) -> Tensor:
        """bool [B, blocks]: which blocks are pages that have not been evicted."""
        return (
            torch.zeros(self.batch_size, blocks, dtype=torch.bool)
            if self._store is None
            else self._store.present(blocks)
        )

    def restore(self, x: Tensor) -> Tensor:
        """From the stored (rotated) space back to the model's."""
        return rotate(x, inverse=True) if self.config.rotate else x

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """k, v [B, Hkv, len(self), D] as attended, for inspection and tests; zeros past each
        sequence's length and where blocks were evicted."""
        from .inspection import dequantize

        leave_graph()
        return dequantize(self)

    # -- changing sequences ---------------------------------------------------------------------------

    def crop(self, length: int | Tensor) -> None:
        """Forget tokens past `length` (an int for all sequences, or int64 [B]); shorter ones stay.

        A crop that cuts into a compressed block returns that block's INT8 values to the buffer.

        Raises:
            InputError: negative, or where a sliding window has released what would be needed.
        """
        leave_graph()
        target = torch.as_tensor(length).cpu()
        if target.is_floating_point() or target.dtype == torch.bool or target.shape not in ((), (self.batch_size,)):
            raise InputError(f"length: expected an integer or int64 [{self.batch_size}], got {length!r}")
        target = target.to(torch.int64).expand(self.batch_size)
        if bool((target < 0).any()):
            raise InputError(f"length: expected at least 0, got {int(target.min())}")
        target = torch.minimum(target, self._lengths)
        if self._store is None or self._buffer is None or torch.equal(target, self._lengths):
            return
        kept = torch.minimum(target // self.config.block_size, self.page_counts)
        check_crop(self._store, self._lengths, target, kept, self.window_size)
        self.kept = None
        rows = rows_behind(self._store, self._buffer, target, kept)
        self._buffer.take(rows, torch.zeros_like(target), target - kept * self.config.block_size)
        self._store.truncate(kept.tolist())
        self._lengths = target.clone()

    def reorder(self, index: Tensor) -> None:
        """Make sequence `i` what sequence `index[i]` was (int64 [B'], repeats allowed). Pages are shared."""
        leave_graph()
        index = torch.as_tensor(index).cpu()
        if index.dim() != 1 or index.is_floating_point():
            raise ShapeError(f"index: expected a vector of integers, got {index.dtype} of shape {tuple(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise InputError(f"index: expected values from 0 to {self.batch_size - 1}, got {index.tolist()}")
        self._take_sequences(self, index.to(torch.int64))

    def clone(self) -> KVCache:
        """An independent cache with the same content. Pages are shared: they never change."""
        leave_graph()
        copy = object.__new__(KVCache)
        copy.__setstate__(self.__dict__)
        copy._take_sequences(self, torch.arange(self.batch_size))
        return copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of any kind have handles of their own."""
        self.__dict__.update(state)
        self._handle = new_handle(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file (kv/storage.py)."""
        from .storage import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> KVCache:
        """Read what `save` wrote. Raises `FormatError` for a damaged, foreign or newer file."""
        from .storage import load_cache

        return load_cache(path, device)

    # -- inside -----------------------------------------------------------------------------------

    def _allocate(self, device: torch.device) -> None:
        if self._store is not None:
            return
        c, batch = self.config, self.batch_size
        state = self.state(device)
        self._k_mean, self._universal = state.k_mean, state.universal
        self._buffer = Int8Buffer(
            batch, self.num_kv_heads, c.block_size - 1 + c.flush_lag, self.head_dim, c.token_scales, device
        )
        self._store = PageStore(c, batch, self.num_kv_heads, self.head_dim, device)

    def _take_sequences(self, source: KVCache, index: Tensor) -> None:
        self._lengths, self.kept = source._lengths[index], None
        if source._store is None or source._buffer is None:
            return
        self._store = source._store.select(index.tolist())
        self._buffer = source._buffer.select(index)
        rows = index.to(source._store.device)
        self._k_mean = None if source._k_mean is None else source._k_mean[rows]
        self._universal = None if source._universal is None else source._universal[:, rows]

    def _stored_mean(self, device: torch.device) -> Tensor:
        """The calibrated mean, in the stored space, for every sequence."""
        assert self._given_mean is not None
        mean = self._given_mean.to(device, torch.float32)
        return (rotate(mean) if self.config.rotate else mean).expand(self.batch_size, -1, -1).contiguous()

    def _evict(self) -> None:
        if self.window_size is None or self._store is None:
            return
        # The next query, at position L, sees L - window + 1 on; one more block stays for crops.
        first = (self._lengths - self.window_size + 1) // self.config.block_size - 1
        self._store.evict(first.clamp(min=0).tolist())


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
