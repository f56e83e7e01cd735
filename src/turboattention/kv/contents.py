"""What a `KVCache` holds: pages, the INT8 buffer and per-sequence state, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..flashq import rotate
from ..modes import in_own_modes
from ..validation import check_config, check_mean, check_sizes
from .buffer import Int8Buffer
from .channel_order import ChannelOrder
from .handle import leave_graph, new_handle
from .pages import Tiles
from .staging import SequenceState, fresh_state
from .store import PageStore
from .widths import HeadBits, parse_head_bits


class Contents:
    """The part of `KVCache` that only reads; its arguments are described there."""

    @in_own_modes
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
        v_head_dim: int | None = None,
    ):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(batch_size, num_kv_heads, (head_dim, v_head_dim), max_tokens, window_size, dtype)
        self.config = check_config(config)
        self.num_kv_heads, self.head_dim, self.v_head_dim = num_kv_heads, head_dim, v_head_dim
        self.window_size, self.max_tokens, self.dtype = window_size, max_tokens, dtype
        self.label: str | None = None
        """How messages name this cache, such as "layer 3"."""
        self.first_head = 0
        """How messages number its first head, where it holds a part of a layer's."""
        self.exact_past: Any = None
        """The stored tokens at full precision, where whoever uses this cache still has them (`guard.ExactPast`)."""
        self._given_bits = parse_head_bits(head_bits, num_kv_heads)
        self._given_mean = check_mean(k_mean, self.config, num_kv_heads, head_dim)
        self._lengths = torch.zeros(batch_size, dtype=torch.int64)
        self._handle = new_handle(self)
        # Memory, made once the device is known: pages, buffer, and per-sequence state of stage 1.
        self._store: PageStore | None = None
        self._buffer: Int8Buffer | None = None
        self._k_mean: Tensor | None = None
        self._query_energy: Tensor | None = None
        self._universal: Tensor | None = None
        self.kept: Any = None
        """What a backend keeps from step to step; forgotten when pages, buffer or sequences change."""
        self.notice: Any = None
        """What a backend that does not wait for its device learns later: `look(label)` raises it, copies of
        the cache have it `copied()`."""
        if device is not None:
            self._allocate(torch.device(device))

    def __len__(self) -> int:
        """The longest sequence's tokens."""
        leave_graph()
        return int(self._lengths.max()) if len(self._lengths) else 0

    def __repr__(self) -> str:
        values = "" if self.v_head_dim == self.head_dim else f"v_head_dim={self.v_head_dim}, "
        return (
            f"KVCache(batch_size={self.batch_size}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"{values}tokens={len(self)}, bits={self.config.bits!r}, nbytes={self.nbytes})"
        )

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, and head_dim of keys and of values."""
        return self.batch_size, self.num_kv_heads, self.head_dim, self.v_head_dim

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

    def look(self) -> None:
        """Raise NonFiniteError where an earlier call had values that were not finite, and nobody was told yet."""
        if self.notice is not None:
            self.notice.look(self.label)

    @property
    def nbytes(self) -> int:
        """Every byte of tensors: pages (used and reserved), buffer, means, scales, widths, lengths, handle.

        Pages that clones share are counted by each of them. What kernels keep beside, the addresses of
        pages (8 bytes each), is theirs and not counted.
        """
        leave_graph()
        given = (self._given_bits, self._given_mean)
        parts = (self._store, self._buffer, self._k_mean, self._universal, self._lengths, self._handle, *given)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_element(self) -> float:
        """`nbytes * 8 / (sum(seq_lens) * Hkv * (D + Dv))`; infinite while empty."""
        elements = int(self._lengths.sum()) * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return self.nbytes * 8 / elements if elements else float("inf")

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
        """Keys [B, H, L, D] or values [B, H, L, Dv] from the space of INT8 rows (rotated) back to the model's."""
        return rotate(x, inverse=True) if self.config.rotate else x

    @property
    def k_order(self) -> ChannelOrder | None:
        """The order of K's channels in compressed pages; None if no head has one, or it is not fixed yet."""
        order = None if self._store is None else self._store.order
        return None if order is None or not bool(order.halved.any()) else order

    def _seen(self, lengths: Tensor) -> int:
        """Tokens that the next query of the longest of sequences so long can see."""
        longest = int(lengths.max()) if len(lengths) else 0
        return longest if self.window_size is None else min(longest, self.window_size)

    def _allocate(self, device: torch.device) -> None:
        if self._store is not None:
            return
        device = torch.empty(0, device=device).device  # "cuda" means the current one: tensors name it
        c, (batch, heads, head_dim, v_head_dim) = self.config, self.token_shape
        state = self.state(device)
        self._k_mean, self._universal = state.k_mean, state.universal
        self._buffer = Int8Buffer(
            batch, heads, c.block_size - 1 + c.flush_lag, head_dim, c.token_scales, device, v_head_dim
        )
        self._store = PageStore(c, batch, heads, head_dim, device, self.window_size is not None, v_head_dim)

    def _stored_mean(self, device: torch.device) -> Tensor:
        """The calibrated mean, in the space of INT8 rows, for every sequence."""
        assert self._given_mean is not None
        mean = self._given_mean.to(device, torch.float32)
        return (rotate(mean) if self.config.rotate else mean).expand(self.batch_size, -1, -1).contiguous()
