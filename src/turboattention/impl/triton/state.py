"""A cache's state on the device and the kernels of a step. The host reads nothing back."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.inputs import BLOCK, QueryPositions, TailRows
from ...kernels.triton.append import flush_blocks, store_tokens
from ...kernels.triton.attention import attend
from ...kernels.triton.lengths import advance, new_tokens
from ...kernels.triton.ordering import Order
from ...kernels.triton.quantize import quantize_queries
from ...kernels.triton.smoothing import first_block_mean
from ...kv.cache import KVCache
from ...kv.in_place import extend
from ...kv.stage1 import MEAN_SKIPS
from ...modes import in_own_modes
from ...params import AttentionParams
from ...uploads import upload
from .deferred_error import cleaned, flag_of
from .device import on_own_device
from .host_lengths import Fills, HostLengths, StepPlan
from .tables import PageTables


class Steps:
    """State of successive steps over a cache; invalid after any other change of the cache.

    Consists of tensors and page tables on the device, which are updated in place, and the host's counts.
    """

    @in_own_modes
    def __init__(self, cache: KVCache):
        assert cache.page_table is not None and cache.tail is not None
        device = cache.page_table.device
        self._config, self._mean_from = cache.config, cache.mean_from
        # Whole blocks: room for the token that fills a block, until it is compressed, and for flush_lag tokens.
        rows = BLOCK * (1 + -(-cache.config.flush_lag // BLOCK))
        self.host_lengths, self.tables = HostLengths(cache, rows), PageTables(cache)
        self._codes, self._scales = cache.tail.memory(rows)
        mean = cache.state(device).k_mean
        self._mean = None if mean is None else mean.contiguous()
        # A step that would compress the first page is refused while the order is not fixed.
        self._order = Order.of(cache.k_order, self._codes[0])
        self._lengths, self._start = (upload(x, device) for x in (cache.lengths.clone(), cache.page_counts * BLOCK))
        self.flag = flag_of(cache).on_device

    @property
    def addresses(self) -> Tensor:
        """`BackendState.addresses`."""
        return self.tables.host

    @in_own_modes
    def copied(self) -> Steps:
        """A copy for a trial step."""
        other = copy.copy(self)
        other._lengths, other._start, other.flag = (x.clone() for x in (self._lengths, self._start, self.flag))
        other._codes, other._scales = (tuple(x.clone() for x in pair) for pair in (self._codes, self._scales))
        other.tables = self.tables.copied()
        return other

    @in_own_modes
    def count(self, cache: KVCache, plan: StepPlan, pages: list[int]) -> None:
        """Update lengths, page tables and counts on the host after a step."""
        alike = len(set(plan.counts)) == 1
        tokens = plan.counts[0] if alike else torch.tensor(plan.counts)
        extend(cache, tokens, plan.filled, pages, self._mean if plan.learned else None)
        self.host_lengths.count(plan)
        self.tables.follow()

    @in_own_modes
    @on_own_device
    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        params: AttentionParams,
        *,
        fills: Fills,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q [B, Hq, Lq, D] and new tokens k [B, H, T, D], v [B, H, T, Dv] -> out in q's dtype, lse float32 [B, Hq, Lq].

        fills: what is stored if blocks fill. counts: int64 [B] (CPU), new tokens and rows of q of each sequence;
        default all. NaN and +inf in the mask are replaced by 0.

        Without counts, a step is device work only, and the same for all steps, so a CUDA graph can capture it.
        """
        tokens = 0 if k is None else k.shape[2]
        taken = new_tokens(self._lengths, tokens, q.shape[2], self._uploaded(counts))
        if k is not None and v is not None:
            self._write(k, v, taken.tokens)
        if params.attn_mask is not None:
            params = replace(params, attn_mask=cleaned(params.attn_mask, self.flag))
        result = self._attend(q, taken.query_positions, params)
        if tokens:
            self._advance(taken.tokens, fills)
        return result

    @in_own_modes
    @on_own_device
    def store(self, k: Tensor, v: Tensor, *, fills: Fills, counts: Tensor | None = None) -> None:
        """Store new tokens k, v [B, H, T, D] without attention."""
        taken = new_tokens(self._lengths, k.shape[2], 0, self._uploaded(counts)).tokens
        self._write(k, v, taken)
        self._advance(taken, fills)

    def _uploaded(self, counts: Tensor | None) -> Tensor | None:
        return None if counts is None else upload(counts, self._lengths.device)

    def _attend(self, q: Tensor, query_positions: QueryPositions, params: AttentionParams) -> tuple[Tensor, Tensor]:
        kv_heads, v_head_dim = self._codes[0].shape[1], self._codes[1].shape[3]
        quantized, _ = quantize_queries(
            q, kv_heads, query_positions.valid, self._mean, params.scale, self._config.rotate, self._order, self.flag
        )
        return attend(
            self._config,
            q,
            query_positions,
            self.tables.on_device if self.host_lengths.paged else None,
            TailRows(*self._codes, *self._scales, self._start),
            params,
            kv_heads=kv_heads,
            v_head_dim=v_head_dim,
            mean=self._mean,
            mean_from_block=self._mean_from // BLOCK,
            quantized=quantized,
        )

    def _write(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        store_tokens(
            self._config,
            (k, v),
            self._lengths,
            counts,
            self._start,
            self._mean,
            self._mean_from,
            self._codes,
            self._scales,
            self.flag,
        )

    def _advance(self, counts: Tensor, fills: Fills) -> None:
        if fills.means and self._mean is not None:
            wanted = (self._lengths < BLOCK) & (self._lengths + counts >= BLOCK)
            keys = self._codes[0], self._scales[0]
            self._mean = first_block_mean(*keys, MEAN_SKIPS, BLOCK, wanted, self._mean)
        p, search = self.tables.on_device, self._config.search
        fills_pages = fills.pages or fills.sinks
        sinks, pages = advance(self._lengths, counts, self._start, p if fills_pages else None, self._config.flush_lag)
        if fills.sinks:
            flush_blocks(p.sinks, self._codes, self._scales, sinks, search)
        if fills.pages and p.compressed is not None:
            flush_blocks(p.compressed, self._codes, self._scales, pages, search, self._order, self._config.rotate)
