"""Shared by the two backends with compiled kernels, which are imported at the first call."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import TurboConfig
from ..params import AttentionParams
from .contract import CheckedCall, Decide, Result

if TYPE_CHECKING:
    from ..kv.cache import KVCache
    from ..kv.paged import PagedBatch, PagedFormat, TailBlocks
    from ..kv.stage1 import Stage


class KernelBackend(ABC):
    """The attention calls of `contract.Backend`, passed to modules of a backend: `attention`, `prompts` and `paged`."""

    @functools.cached_property
    @abstractmethod
    def _attention(self) -> Any: ...

    @functools.cached_property
    @abstractmethod
    def _prompts(self) -> Any: ...

    @functools.cached_property
    @abstractmethod
    def _paged(self) -> Any: ...

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, config: TurboConfig, params: AttentionParams) -> Result:
        return self._attention.prefill(q, k, v, config, params)

    def attend_cache(self, call: CheckedCall, cache: KVCache, staged: Stage | None, **rows: Any) -> Result:
        return self._attention.attend_cache(call.q, cache, staged, call.params, **rows)

    def step(self, call: CheckedCall, cache: KVCache) -> Result | None:
        return self._attention.step(call.q, cache, call.k, call.v, call.params, call.counts)

    def prompt(self, call: CheckedCall, cache: KVCache, decide: Decide) -> Result | None:
        return self._prompts.prompt(call, cache, decide)

    def paged_attention(
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
        return self._paged.paged_attention(fmt, layer, batch, q, k, v, out, pages, tail_blocks, params, sinks)
