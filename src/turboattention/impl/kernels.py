"""What the two backends that run compiled kernels share: their kernels are imported at the first call."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import TurboConfig
from .contract import AttentionParams, Result

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..kv.stage1 import Stage


class KernelBackend(ABC):
    """The attention calls of `contract.Backend`, passed to `attention` and `paged` of a backend's package."""

    @functools.cached_property
    @abstractmethod
    def _attention(self) -> Any: ...

    @functools.cached_property
    @abstractmethod
    def _paged(self) -> Any: ...

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, config: TurboConfig, params: AttentionParams) -> Result:
        return self._attention.prefill(q, k, v, config, params)

    def attend_cache(
        self, q: Tensor, cache: KVCache, staged: Stage | None, params: AttentionParams, **rows: Any
    ) -> Result:
        return self._attention.attend_cache(q, cache, staged, params, **rows)

    def step(
        self,
        q: Tensor,
        cache: KVCache,
        k: Tensor | None,
        v: Tensor | None,
        params: AttentionParams,
        counts: Tensor | None,
    ) -> Result | None:
        return self._attention.step(q, cache, k, v, params, counts)

    def paged_attention(self, *arguments: Any, **options: Any) -> bool:
        return self._paged.paged_attention(*arguments, **options)
