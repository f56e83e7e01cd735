"""Backend "reference": the specification in plain PyTorch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..params import AttentionParams
from .contract import Availability, CallTraits, CheckedCall, Decide, Result

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..kv.stage1 import Stage


class ReferenceBackend:
    """`contract.Backend` over `reference`."""

    name = "reference"
    checks_finite = ("k", "v")
    paged_attention = None
    reorders_pages = False

    def availability(self) -> Availability:
        return Availability("reference", True, "plain PyTorch, runs on any device")

    def refusal(self, call: CallTraits) -> None:
        return None

    def slower(self, call: CallTraits | None) -> None:
        return None

    def quantizer(self, device: torch.device) -> None:
        return None

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, config: TurboConfig, params: AttentionParams) -> Result:
        from ..reference.prefill import prefill

        return prefill(q, k, v, config, params)

    def attend_cache(self, call: CheckedCall, cache: KVCache, staged: Stage | None, **rows: Any) -> Result:
        from ..reference.decode import attend_cache

        return attend_cache(call.q, cache, staged, call.params, **rows)

    def step(self, call: CheckedCall, cache: KVCache) -> None:
        return None

    def prompt(self, call: CheckedCall, cache: KVCache, decide: Decide) -> None:
        return None
