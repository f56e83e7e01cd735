"""Data structures that a server and the kernels share: the page format, INT8 tail rows, and the batch.

See `turboattention.paged`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import ConfigError, InputError, ShapeError
from ..modes import in_own_modes
from ..words import number_of
from .channel_order import ChannelOrder, check_order
from .layout import PageLayout
from .stage1 import stored_mean

BLOCK = 64
"""Tokens per page."""

PAGE_UNIT = 64
"""Page sizes are multiples of this many bytes, so that bytes per token are an integer."""

T = TypeVar("T")

HeadBits = tuple[tuple[int, ...], tuple[int, ...]]
"""Widths of K and V, one per KV head."""


@dataclass(frozen=True)
class PagedFormat:
    """The page format of all layers.

    head_bits: for each layer, the widths of this process's KV heads. page_bytes: bytes reserved per page, the maximum
    over all layers (and over all ranks, if heads are distributed). means: for each layer None or float32 [H, D], which
    is subtracted from keys before they are stored (in the model's space, on the device of the pages); empty for none.
    orders: with `reorder_k`, for each layer the order of K's channels in its pages, from a calibration; else empty.

    Raises:
        ConfigError: the configuration or page_bytes is not supported, or `reorder_k` without orders. ShapeError: means
            or orders of other shapes. DtypeError, InputError: invalid orders.
    """

    config: TurboConfig
    head_dim: int
    head_bits: tuple[HeadBits, ...]
    page_bytes: int
    means: tuple[Tensor | None, ...] = field(default=(), compare=False)
    orders: tuple[ChannelOrder, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        wanted = {"block_size": BLOCK, "stored_prefill": True, "sink_tokens": 0, "token_scales": True}
        for name, value in wanted.items():
            if getattr(self.config, name) != value:
                raise ConfigError(f"config: expected {name}={value!r} for pages, got {getattr(self.config, name)!r}")
        needed = reserved_bytes(self.head_dim, self.head_bits)
        if self.page_bytes % PAGE_UNIT or self.page_bytes < needed:
            raise ConfigError(
                f"page_bytes: expected a multiple of {PAGE_UNIT} of at least {needed}, got {self.page_bytes}"
            )
        for mean in self.means:
            if mean is not None and mean.shape != (self.kv_heads, self.head_dim):
                raise ShapeError(f"means: expected [{self.kv_heads}, {self.head_dim}] each, got {list(mean.shape)}")
        object.__setattr__(self, "orders", self._checked_orders())
        _ = self.stored_means  # computed here, since it cannot be computed during a CUDA graph capture

    def _checked_orders(self) -> tuple[ChannelOrder, ...]:
        """`orders`, or none if K has 8 bits. An order derived from a block would make the bytes of later blocks depend
        on which block was the first."""
        wanted = len(self.head_bits) if self.config.reorder_k else 0
        if len(self.orders) != wanted:
            raise ConfigError(
                f"orders: expected {wanted} for {number_of(len(self.head_bits), 'layer')} with "
                f"reorder_k={self.config.reorder_k}, got {len(self.orders)}: pages take the order of "
                "K's channels from a calibration"
            )
        checked = [check_order(order, self.config, self.kv_heads, self.head_dim, "orders") for order in self.orders]
        return tuple(order for order in checked if order is not None)

    @classmethod
    def of(
        cls,
        config: TurboConfig,
        head_dim: int,
        head_bits: Sequence[HeadBits],
        means: tuple[Tensor | None, ...] = (),
        orders: tuple[ChannelOrder, ...] = (),
    ) -> PagedFormat:
        """A format with the smallest page size for these widths. Arguments and errors as in the class."""
        return cls(config, head_dim, tuple(head_bits), reserved_bytes(head_dim, head_bits), means, orders)

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer, of this process."""
        return len(self.head_bits[0][0])

    @cached_property
    def layouts(self) -> tuple[PageLayout, ...]:
        """The page layout of each layer."""
        halves = [() if order is None else tuple(order.halved.tolist()) for order in self._stored_orders]
        return tuple(_layout(self.head_dim, *layer) for layer in zip(self.head_bits, halves, strict=True))

    @cached_property
    def order_tables(self) -> tuple[Tensor | None, ...]:
        """`ChannelOrder.table` of each layer; None if no head has two widths."""
        return tuple(None if order is None else order.table for order in self._stored_orders)

    @cached_property
    def _stored_orders(self) -> tuple[ChannelOrder | None, ...]:
        found = [order.at(torch.tensor(bits)) for order, bits in zip(self.orders, self.head_bits, strict=False)]
        kept = [order if bool(order.halved.any()) else None for order in found]
        return tuple(kept) or (None,) * len(self.head_bits)

    @cached_property
    def stored_means(self) -> tuple[Tensor | None, ...]:
        """The means in stored (rotated) space, bfloat16 [H, D], one per layer."""
        means = self.means or (None,) * len(self.head_bits)
        return tuple(None if mean is None else stored_mean(self.config, mean) for mean in means)


def reserved_bytes(head_dim: int, head_bits: Iterable[HeadBits]) -> int:
    """Bytes per page that suffice for all of these widths (K and V of each layer): a multiple of `PAGE_UNIT`."""
    largest = max((_layout(head_dim, bits).page_bytes for bits in head_bits), default=0)
    return -(-largest // PAGE_UNIT) * PAGE_UNIT


def _layout(head_dim: int, bits: HeadBits, halves: tuple[bool, ...] = ()) -> PageLayout:
    return PageLayout(head_dim, BLOCK, *bits, token_scales=True, k_halves=halves)


class TailBlocks:
    """INT8 rows of incomplete blocks: one tail slot per running sequence, in all layers.

    codes: int8 [layers, num_slots, H, ring, D] of K and V; scales: float32 [layers, num_slots, H, ring]. Position p of
    a sequence is row `p % ring` of its slot.

    exact_rows: how many first queries of a sequence are computed in floating point (`TurboConfig.exact_rows`). Their
    keys and values are kept, so that results do not depend on how a prompt is scheduled: `first` of K and V, `dtype`
    [layers, num_slots + 1, exact_rows, H, D], the last slot for rows of no sequence; use the dtype of the tokens.

    ring: 64, or 128 if up to 64 tokens may be rejected (speculative decoding). Raises InputError for other values.
    """

    @in_own_modes
    def __init__(
        self,
        layers: int,
        num_slots: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        ring: int = BLOCK,
        exact_rows: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        if ring not in (BLOCK, 2 * BLOCK):
            raise InputError(f"ring: expected {BLOCK} or {2 * BLOCK}, got {ring}")
        self.ring = ring
        shape = layers, num_slots, kv_heads, ring
        self.codes = [torch.zeros(*shape, head_dim, dtype=torch.int8, device=device) for _ in "kv"]
        self.scales = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in "kv"]
        self.exact_rows, first = exact_rows, (layers, num_slots + 1, exact_rows, kv_heads, head_dim)
        self.first = [torch.zeros(first, dtype=dtype, device=device) for _ in "kv"] if exact_rows else []
        (kc, vc), (ks, vs) = self.codes, self.scales
        self._layers = [((kc[layer], vc[layer]), (ks[layer], vs[layer])) for layer in range(layers)]
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        """On a GPU: set to 1 by a step with values that are not finite."""
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=True) if self.flag.is_cuda else self.flag

    def of(self, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One layer's codes and scales, each a pair for K and V."""
        return self._layers[layer]

    @in_own_modes
    def poll_nonfinite(self) -> bool:
        """Whether an earlier step on a GPU had values that were not finite; clears the flag.

        Does not wait for the device: starts an asynchronous copy of the flag, which a later call reads.
        """
        raised = bool(self._seen)
        if raised:
            self.flag.zero_()
            self._seen.zero_()
        elif self._seen is not self.flag:
            self._seen.copy_(self.flag, non_blocking=True)
        return raised

    @property
    def num_slots(self) -> int:
        """Tail slots of each layer."""
        return self.codes[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and first tokens, over all layers."""
        return sum(x.nbytes for x in (*self.codes, *self.scales, *self.first))


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one step, for all layers.

    query_start: [R + 1], sequence r has rows `query_start[r]` to `query_start[r + 1]` (exclusive) of the flat tokens.
    seq_lens: [R], tokens of each sequence, including this step's. block_table: [R, P], page numbers. tail_slots: [R],
    slots in the `TailBlocks`. All are int32 or int64, on the device of the tokens.

    max_query_len: an upper bound of the tokens per sequence in this step, or None. On a GPU, it and the shapes
    determine which kernels run: steps of one token, or of up to 64 with a ring of 128, need no temporary memory.
    Sequences without tokens and tokens after `query_start[R]` are padding and are ignored.

    A step of a sequence starts at a multiple of 64, or continues the block in its slot. If tokens were rejected, it
    starts before the end of the previous step.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    tail_slots: Tensor
    max_query_len: int | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Any, derive: Callable[[], T]) -> T:
        """`derive()`, computed once per step for all layers with the same `key`."""
        if key not in self._derived:
            self._derived[key] = derive()
        return self._derived[key]
