"""`KVCache`: sequences as compressed pages followed by a buffer of INT8 rows."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import InputError, ShapeError
from ..flashq import rotate
from ..modes import in_own_modes
from ..validation import check_config, check_lengths, check_mean, check_new, check_sizes, refuse_gradients
from .attachments import BackendState, DeferredError, ExactPast
from .channel_order import ChannelOrder, check_order
from .compression import compression_of
from .crop import crop, crop_target
from .growth import allocate, commit, stage
from .handle import leave_graph, new_handle
from .page_table import PageTable
from .pages import Tiles
from .quantizer import quantizer_for
from .sequences import take_sequences
from .stage1 import SequenceState, fresh_state
from .tail_buffer import TailBuffer
from .widths import GivenBits, parse_head_bits, uniform_head_bits


class KVCache:
    """Quantized keys and values of `batch_size` sequences (the format is in kv/layout.py).

    The first `config.sink_tokens` of a sequence are pages of INT8, then follow pages of 2 to 8 bits
    a head, then an INT8 buffer of fewer than `block_size + flush_lag` tokens.

    Args:
        batch_size, num_kv_heads, head_dim: at least 0, at least 1, a multiple of 8 up to 512 (256 on GPUs, where the
            reference computes wider heads).
        config: `TurboConfig()` by default.
        head_bits: widths per KV head, [Hkv] or [2, Hkv] (K, V). By default they follow from `config.bits`; they are
            decided when the first block is compressed, and do not change after that.
        max_tokens: tokens per sequence to reserve memory for; more may be appended.
        device, dtype: where the cache lives, and what `dequantize` returns; by default those of
            the first tokens appended.
        window_size: for sliding-window layers. Blocks that no later query can see are released, but 16 tokens late, so
            that the last 16 tokens can still be cropped.
        k_mean: float [Hkv, D], a calibrated mean of K for smoothing; by default it is taken from
            each sequence's first block.
        v_head_dim: head_dim of values if it differs from that of keys, also a multiple of 8 up to 512. The GPU kernels
            support up to 256; on GPUs, the reference computes other caches.
        k_order: with `reorder_k`, a `ChannelOrder` from a calibration, with which stored bytes do not depend on the
            batch; by default it is found when the first block is compressed.

    Raises:
        ConfigError, ShapeError, DtypeError, InputError for arguments out of range.
    """

    @in_own_modes
    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        config: TurboConfig | None = None,
        head_bits: GivenBits | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window_size: int | None = None,
        k_mean: Tensor | None = None,
        v_head_dim: int | None = None,
        k_order: ChannelOrder | None = None,
    ):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(batch_size, num_kv_heads, (head_dim, v_head_dim), max_tokens, window_size, dtype)
        self.config = check_config(config)
        self.num_kv_heads, self.head_dim, self.v_head_dim = num_kv_heads, head_dim, v_head_dim
        self.window_size, self.max_tokens, self.dtype = window_size, max_tokens, dtype
        self.label: str | None = None
        """How messages name this cache, such as "layer 3"."""
        self.first_head = 0
        """The number that messages give to its first head, if it holds only some of a layer's heads."""
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        """`seq_lens` without the copy: replaced, never changed, when tokens are added."""
        self.handle = new_handle(self)
        """int64 [1] on the CPU that stands for this cache in compiled graphs (kv/handle.py)."""
        # What the user fixed, or None.
        self.given_bits = parse_head_bits(head_bits, num_kv_heads)
        self.given_mean = check_mean(k_mean, self.config, num_kv_heads, head_dim)
        self.given_order = check_order(k_order, self.config, num_kv_heads, head_dim)
        # Memory, allocated once the device is known.
        self.page_table: PageTable | None = None
        self.tail: TailBuffer | None = None
        # Stage 1 of each sequence (`SequenceState`), and the queries that K's order is learned from.
        self.k_mean: Tensor | None = None
        self.universal: Tensor | None = None
        self.query_energy: Tensor | None = None
        # Attached by others.
        self.backend_state: BackendState | None = None
        self.deferred_error: DeferredError | None = None
        self.exact_past: ExactPast | None = None
        if device is not None:
            allocate(self, torch.device(device))

    def __len__(self) -> int:
        """The longest sequence's tokens."""
        leave_graph()
        return int(self.lengths.max()) if len(self.lengths) else 0

    def __repr__(self) -> str:
        values = "" if self.v_head_dim == self.head_dim else f"v_head_dim={self.v_head_dim}, "
        return (
            f"KVCache(batch_size={self.batch_size}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"{values}tokens={len(self)}, bits={self.config.bits!r}, nbytes={self.nbytes})"
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.lengths.shape[0]

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, and head_dim of keys and of values."""
        return self.batch_size, self.num_kv_heads, self.head_dim, self.v_head_dim

    @property
    def seq_lens(self) -> Tensor:
        """int64 [B] on the CPU: tokens of each sequence, evicted ones included."""
        if torch.compiler.is_dynamo_compiling():  # what is here while tracing is old when the graph runs
            return torch.ops.turboattention.seq_lens(self.handle, len(self.lengths))
        return self.lengths.clone()

    @property
    def device(self) -> torch.device | None:
        """The device of the pages and the buffer; None until the constructor or the first tokens fix it."""
        leave_graph()
        return self.page_table.device if self.page_table is not None else None

    @property
    def nbytes(self) -> int:
        """Every byte of tensors: pages (used and reserved), buffer, means, scales, widths, the channel order and what
        it is learned from, lengths, handle.

        Pages that clones share are counted by each of them. Not counted are the addresses of pages that backends keep
        for their kernels, 8 bytes per page.
        """
        leave_graph()
        given = (self.given_bits, self.given_mean, self.given_order)
        learned = (self.k_mean, self.universal, self.query_energy)
        parts = (self.page_table, self.tail, self.lengths, self.handle, *learned, *given)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_element(self) -> float:
        """`nbytes * 8 / (sum(seq_lens) * Hkv * (D + Dv))`; infinite while empty."""
        elements = int(self.lengths.sum()) * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return self.nbytes * 8 / elements if elements else float("inf")

    # -- the format of pages ----------------------------------------------------------------------------

    @property
    def head_bits(self) -> Tensor | None:
        """int64 [2, Hkv], widths of K and V; None until given or frozen."""
        leave_graph()
        frozen = self.page_table.pools.head_bits if self.page_table is not None else None
        bits = frozen if frozen is not None else self.given_bits
        return None if bits is None else bits.clone()

    @property
    def frozen(self) -> bool:
        """Whether the widths of compressed pages and the order of K's channels in them are fixed."""
        return self.page_table is not None and self.page_table.pools.compressed is not None

    @property
    def configured_bits(self) -> Tensor | None:
        """int64 [2, Hkv]: the widths given or configured; None for bits="mixed", which depends on the tokens."""
        return self.given_bits if self.given_bits is not None else uniform_head_bits(self.config, self.num_kv_heads)

    @property
    def learns_order(self) -> bool:
        """Whether the order of K's channels is to be found and not fixed yet."""
        return self.config.reorders_k and self.given_order is None and not self.frozen

    @property
    def learns_mean(self) -> bool:
        """Whether the mean of K is computed from each sequence's first block."""
        return self.config.smooth_k and self.given_mean is None

    @property
    def k_order(self) -> ChannelOrder | None:
        """The order of K's channels in compressed pages; None if no head has one, or there is no such page yet."""
        order = None if self.page_table is None else self.page_table.pools.order
        return None if order is None or not bool(order.halved.any()) else order

    @property
    def sink_blocks(self) -> int:
        """Blocks at the start of each sequence that stay INT8."""
        return self.config.sink_tokens // self.config.block_size

    @property
    def mean_from(self) -> int:
        """First position whose key is stored without the mean of K (with `smooth_k`)."""
        return 0 if self.given_mean is not None else self.config.block_size

    def freeze(self, head_bits: Tensor, order: ChannelOrder | None = None) -> None:
        """Fix the widths int64 [2, Hkv] of all pages after the sinks and the order of K's channels, and reserve memory
        for `max_tokens`."""
        assert self.page_table is not None
        self.page_table.pools.freeze(head_bits, order)
        self.page_table.reserve(self.max_tokens or 0, self.window_size)

    # -- reading ----------------------------------------------------------------------------------------

    def state(self, device: torch.device) -> SequenceState:
        """What stage 1 and attention read of the blocks that are not pages."""
        if self.page_table is None or self.tail is None:
            shape = self.batch_size, self.num_kv_heads, self.head_dim
            return fresh_state(self.config, *shape, device, given_mean=self.given_mean)
        return SequenceState(
            lengths=self.lengths,
            start=self.page_counts * self.config.block_size,
            tail_tiles=self.tail.tiles(),
            k_mean=self.k_mean,
            k_mean_fixed=self.given_mean is not None,
            universal=self.universal,
        )

    @property
    def page_counts(self) -> Tensor:
        """int64 [B]: blocks of each sequence that are pages, evicted ones included."""
        leave_graph()
        return self.page_table.counts if self.page_table is not None else torch.zeros_like(self.lengths)

    def page_tiles(self, first: int, last: int) -> Tiles:
        """INT8 tiles [B, n, H, block, D] of blocks `first` to `last` (exclusive); scale 0 where no page is."""
        assert self.page_table is not None
        return self.page_table.tiles(first, last)

    def readable_pages(self, blocks: int) -> Tensor:
        """bool [B, blocks]: which blocks are pages that have not been evicted."""
        if self.page_table is None:
            return torch.zeros(self.batch_size, blocks, dtype=torch.bool)
        return self.page_table.present(blocks)

    def restore(self, x: Tensor) -> Tensor:
        """Keys [B, H, L, D] or values [B, H, L, Dv] from the space of INT8 rows (rotated) back to the model's."""
        return rotate(x, inverse=True) if self.config.rotate else x

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """k [B, Hkv, len(self), D] and v [B, Hkv, len(self), Dv] as attended, in `dtype` (float32 while that is not
        fixed), for inspection and tests; zeros past each sequence's length and where blocks were evicted."""
        from .dequantization import dequantize

        leave_graph()
        return dequantize(self)

    def look(self) -> None:
        """Raise NonFiniteError if an earlier call had values that were not finite and has not been reported yet."""
        if self.deferred_error is not None:
            self.deferred_error.look(self.label)

    # -- changing sequences -----------------------------------------------------------------------------

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

        Examples:
            Rows are sequences, columns the positions in the cache after the call; 1 is a token that this call appends.
            `past` is the number of tokens of each sequence before the call::

                past=[2, 4, 0], T=3, lengths=[3, 1, 0]
                0 0 1 1 1    # tokens 0 to 2 of k and v
                0 0 0 0 1    # token 0; the others are not read
                0 0 0 0 0
        """
        if torch.compiler.is_dynamo_compiling():
            refuse_gradients(k=k, v=v)
            torch.ops.turboattention.append(self.handle, k, v, lengths)
            return
        check_new(self.token_shape, self.device, k, v)
        counts = None if lengths is None else check_lengths(lengths, self.batch_size, k.shape[2])
        if not quantizer_for(k.device, k.dtype).append(self, k, v, counts):
            staged = stage(self, k, v, counts)
            commit(self, staged, compression_of(self, staged))

    @in_own_modes
    def crop(self, length: int | Tensor) -> None:
        """Remove tokens past `length` (an int for all sequences, or int64 [B]); shorter sequences do not change.

        A crop that cuts into a compressed block returns that block's INT8 values to the buffer.

        Raises:
            InputError: `length` is negative, or a sliding window has released blocks that would be needed.
        """
        leave_graph()
        crop(self, length)

    def check_crop(self, length: int | Tensor) -> None:
        """Raises what `crop` would raise, and changes nothing."""
        crop_target(self, length)

    @in_own_modes
    def reorder(self, index: Tensor) -> None:
        """Replace sequence `i` by sequence `index[i]` (int64 [B'], repeats allowed). Pages are shared.

        Raises:
            ShapeError: `index` is not a vector of integers. InputError: it names a sequence that does not exist.
        """
        leave_graph()
        index = torch.as_tensor(index).cpu()
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ShapeError(f"index: expected a vector of integers, got {index.dtype} of shape {tuple(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise InputError(f"index: expected values from 0 to {self.batch_size - 1}, got {index.tolist()}")
        take_sequences(self, self, index.to(torch.int64))

    @in_own_modes
    def clone(self) -> KVCache:
        """An independent cache with the same content. Pages are shared: they never change."""
        leave_graph()
        copy = object.__new__(KVCache)
        copy.__setstate__(self.__dict__)
        take_sequences(copy, self, torch.arange(self.batch_size))
        return copy

    def __copy__(self) -> KVCache:
        """`clone`: two caches that shared memory would write into each other's."""
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "backend_state": None, "exact_past": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of any kind have handles of their own."""
        self.__dict__.update(state)
        self.handle = new_handle(self)
        self.deferred_error = None if self.deferred_error is None else self.deferred_error.copied()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file, atomically (kv/serialization.py).

        Raises:
            InputError: the file cannot be written.
        """
        from .serialization import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> KVCache:
        """Read what `save` wrote, to `device` (the CPU by default).

        Raises:
            FormatError: the file is damaged, not of this format, or of another version. FileNotFoundError.
        """
        from .serialization import load_cache

        return load_cache(path, device)
