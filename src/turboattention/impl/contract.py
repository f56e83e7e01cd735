"""What a backend is: the protocol that all of them implement, and what their calls are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import TurboConfig

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..kv.quantizer import Quantizer
    from ..kv.stage1 import Stage


@dataclass(frozen=True)
class AttentionParams:
    """Parameters of attention, as `turbo_attention` describes them; checked.

    scale: factor of the logits. window_size, softcap: None for none. attn_mask: [B or 1, Hq or 1, Lq or 1, Lk or 1],
    bool or additive float, or None.
    """

    is_causal: bool
    scale: float
    window_size: int | None = None
    softcap: float | None = None
    attn_mask: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """The properties of a call that determine who can run it."""

    config: TurboConfig
    dtype: torch.dtype
    device: torch.device
    queries: int = 1
    head_dims: tuple[int, int] | None = None
    """Of keys and of values, if they are known."""


@dataclass(frozen=True)
class Availability:
    """A backend as found on this machine; `reason` says why it is usable or not."""

    name: str
    usable: bool
    reason: str


Result = tuple[Tensor, Tensor]
"""out [B, Hq, Lq, D] in q's dtype, and lse [B, Hq, Lq], natural logarithm."""


class Backend(Protocol):
    """Attention on one kind of device. Arguments of calls are checked; `call` was not refused.

    Importing a backend imports no kernels: its methods do.
    """

    @property
    def name(self) -> str: ...

    @property
    def checks_finite(self) -> tuple[str, ...]:
        """Those of "q", "k" and "v" whose values `prefill` checks where its kernels read them."""
        ...

    def availability(self) -> Availability: ...

    def refusal(self, call: Call) -> str | None:
        """Why this backend, if it is usable, does not compute a call; None if it does."""
        ...

    def slower(self, call: Call | None) -> str | None:
        """Why "auto" leaves a call that this backend computes to the next one, or None."""
        ...

    def quantizer(self, device: torch.device) -> Quantizer | None:
        """Stage 1 and the page codec for tensors on a device, or None if PyTorch's are used there."""
        ...

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, config: TurboConfig, params: AttentionParams) -> Result:
        """Attention without a cache: q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D]."""
        ...

    def attend_cache(
        self,
        q: Tensor,
        cache: KVCache,
        staged: Stage | None,
        params: AttentionParams,
        *,
        head_bits: Tensor | None,
        positions: Tensor,
        valid: Tensor,
    ) -> Result:
        """Attention over a cache and the new tokens in `staged`; the cache is not changed.

        positions, valid: int64 and bool [B, Lq]; rows that are not valid give 0 and -inf. head_bits: int64 [2, Hkv],
        the widths that committing `staged` would freeze; used only with `stored_prefill`."""
        ...

    def step(
        self,
        q: Tensor,
        cache: KVCache,
        k: Tensor | None,
        v: Tensor | None,
        params: AttentionParams,
        counts: Tensor | None,
    ) -> Result | None:
        """Attend and append at once, k and v [B, Hkv, T, D] of which sequence b takes `counts[b]` tokens (int64 [B],
        default all). None, with the cache unchanged, if the call needs `attend_cache`."""
        ...

    def paged_attention(self, *arguments: Any, **options: Any) -> bool:
        """`paged.paged_attention` with checked arguments. Raises NotImplementedError if the backend has none."""
        ...
