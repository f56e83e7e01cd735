"""The protocol that all backends implement, and the arguments of their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..config import TurboConfig
from ..params import AttentionParams

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..kv.compression import Compression
    from ..kv.in_place import Decided
    from ..kv.paged import PagedBatch, PagedFormat, TailBlocks
    from ..kv.quantizer import Quantizer
    from ..kv.stage1 import Stage


@dataclass(frozen=True)
class CheckedCall:
    """A call of attention over a cache. Everything except values is validated, against each other and the cache.

    q: [B, Hq, Lq, D]. k, v: new tokens [B, Hkv, T, D] and [B, Hkv, T, Dv], or None. counts: int64 [B] (CPU), how many
    of the T tokens each sequence takes (row i of q is then token i, and rows from `counts[b]` on are padding), or None
    for all. The mask of `params` is for as many keys as the longest sequence has with the new tokens.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    counts: Tensor | None
    params: AttentionParams


@dataclass(frozen=True)
class CallTraits:
    """The properties of a call that determine which backends can run it."""

    config: TurboConfig
    dtype: torch.dtype
    device: torch.device
    queries: int = 1
    head_dims: tuple[int, int] | None = None
    """head_dim of keys and of values, if they are known."""


@dataclass(frozen=True)
class Availability:
    """A backend as found on this machine; `reason` says why it is usable or not."""

    name: str
    usable: bool
    reason: str


Result = tuple[Tensor, Tensor]
"""out [B, Hq, Lq, D] in q's dtype, and lse [B, Hq, Lq], natural logarithm."""

Decide = Callable[[], "Decided | None"]
"""Computes the mean, widths and order that the first tokens of a call determine; None if all are fixed already
(`in_place.deciding_tokens`). May warn (`guard.guarded`). Raises NonFiniteError."""


class PagedAttention(Protocol):
    """`turboattention.paged.paged_attention` with checked arguments."""

    def __call__(
        self,
        fmt: PagedFormat,
        layer: int,
        batch: PagedBatch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        pages: Tensor,
        tail_blocks: TailBlocks,
        params: AttentionParams,
        sinks: Tensor | None,
    ) -> bool:
        """False if values were not finite, as far as this is known without waiting."""
        ...


class Backend(Protocol):
    """Attention on one kind of device. Arguments of calls are checked, and the call was not refused.

    Importing a backend imports no kernels: its methods do.
    """

    @property
    def name(self) -> str: ...

    @property
    def checks_finite(self) -> tuple[str, ...]:
        """Those of "q", "k" and "v" whose values `prefill` checks itself."""
        ...

    def availability(self) -> Availability: ...

    def refusal(self, call: CallTraits) -> str | None:
        """The reason why this backend, if it is usable, does not support a call; None if it does."""
        ...

    def slower(self, call: CallTraits | None) -> str | None:
        """The reason why "auto" prefers the next backend for a call that this one supports, or None."""
        ...

    def quantizer(self, device: torch.device) -> Quantizer | None:
        """Stage 1 and the page codec for tensors on a device, or None if PyTorch's are used there."""
        ...

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, config: TurboConfig, params: AttentionParams) -> Result:
        """Attention without a cache: q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D]."""
        ...

    def attend_cache(
        self,
        call: CheckedCall,
        cache: KVCache,
        staged: Stage | None,
        *,
        compression: Compression | None,
        positions: Tensor,
        valid: Tensor,
    ) -> Result:
        """Attention over a cache and the call's new tokens, which are `staged`; the cache is not changed.

        positions, valid: int64 and bool [B, Lq]; rows that are not valid give 0 and -inf. compression: what committing
        `staged` compresses, which queries in later blocks read with `stored_prefill`; None without new tokens."""
        ...

    def step(self, call: CheckedCall, cache: KVCache) -> Result | None:
        """Attend and append the call's new tokens at once, if they are few. None, with the cache unchanged, if the call
        needs `prompt` or `attend_cache`."""
        ...

    def prompt(self, call: CheckedCall, cache: KVCache, decide: Decide) -> Result | None:
        """`step` for calls with any number of new tokens. None, with the cache unchanged, if the call needs
        `attend_cache`.

        decide: to be called if this call compresses a cache's first blocks; a backend that leaves such calls to
        `attend_cache` does not need it."""
        ...

    @property
    def paged_attention(self) -> PagedAttention | None:
        """Attention over the pages of a server, or None if the backend has no kernels for that."""
        ...

    @property
    def reorders_pages(self) -> bool:
        """Whether `paged_attention` computes `TurboConfig.reorder_k`."""
        ...
