"""Prompts of backend "triton" into a cache, without waiting for the device: calls of more tokens than a step takes.

The host knows all lengths, so it knows which blocks fill and allocates their pages. Tokens are staged, attended and
stored as on the general path, but values that are not finite are read as zeros and reported later, as in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ...kernels.inputs import BLOCK, QueryPositions, gpu_refusal
from ...kernels.triton import quantize, smoothing
from ...kernels.triton.attention import refusal
from ...kv.cache import KVCache
from ...kv.compression import compression_of
from ...kv.growth import allocate, commit, stage, token_counts
from ...kv.stage1 import Stage
from ...modes import in_own_modes
from ...params import AttentionParams
from ..contract import CheckedCall, Decide, Result
from .attention import attend_state
from .deferred_error import cleaned, flag_of
from .device import on_own_device
from .steps import tokens_decide

if TYPE_CHECKING:
    from ...kv.quantizer import TokenQuantizer


@in_own_modes
def prompt(call: CheckedCall, cache: KVCache, decide: Decide) -> Result | None:
    """`contract.Backend.prompt`. None if tokens of the call decide widths or an order, for which the host would
    wait, or if query rows are not those of the new tokens."""
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    if q.shape[2] != k.shape[2]:
        return None
    counts = token_counts(call.counts, len(k), k.shape[2])
    if not _takes(cache, k, counts, attends=True):
        return None
    return _attend(q, cache, k, v, counts, call.params)


@on_own_device
def _attend(q: Tensor, cache: KVCache, k: Tensor, v: Tensor, counts: Tensor, params: AttentionParams) -> Result:
    staged, flag = _staged(cache, k, v, counts)
    rows = QueryPositions(staged.before, counts, staged.lengths)
    params = replace(params, attn_mask=cleaned(params.attn_mask, flag))
    result = attend_state(q, cache, staged, rows, params, flag)
    _commit(cache, staged)
    return result


@in_own_modes
@on_own_device
def append(cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None) -> bool:
    """`kv.quantizer.Quantizer.append`."""
    counts = token_counts(counts, len(k), k.shape[2])
    if not _takes(cache, k, counts, attends=False):
        return False
    _commit(cache, _staged(cache, k, v, counts)[0])
    return True


def _takes(cache: KVCache, k: Tensor, counts: Tensor, attends: bool) -> bool:
    config = cache.config
    if not k.numel() or not config.token_scales or refusal(config, k.dtype):
        return False
    if gpu_refusal((cache.head_dim, cache.v_head_dim)):
        return False
    blocks = int((cache.lengths + counts).max() - config.flush_lag) // BLOCK
    return cache.frozen or blocks <= cache.sink_blocks or not tokens_decide(cache, attends)


def _staged(cache: KVCache, k: Tensor, v: Tensor, counts: Tensor) -> tuple[Stage, Tensor]:
    """The stage, and the cache's flag for values that are not finite."""
    cache.look()
    allocate(cache, k.device)
    flag = flag_of(cache).on_device
    return stage(cache, k, v, counts, quantizer=cast("TokenQuantizer", _Telling(flag))), flag


def _commit(cache: KVCache, staged: Stage) -> None:
    commit(cache, staged, compression_of(cache, staged))
    flag_of(cache).send()


@dataclass(frozen=True)
class _Telling:
    """`kv.quantizer.TokenQuantizer` that sets a flag where values are not finite, instead of waiting for them."""

    flag: Tensor
    checks_finite: bool = True

    def quantize_tokens(self, *arguments: Any) -> bool:
        return quantize.quantize_tokens(*arguments, flag=self.flag)

    def first_block_mean(self, *arguments: Any) -> Tensor:
        return smoothing.first_block_mean(*arguments)
