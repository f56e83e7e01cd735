"""Prompts of backend "cpu": attention and storing in one call of the C++ extension, however many blocks fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ...errors import NonFiniteError
from ...kernels.cpu.attention import refusal
from ...kernels.cpu.step import Step
from ...kv.cache import KVCache
from ...kv.compression import compression_of
from ...kv.growth import stage
from ...kv.in_place import Decided, deciding_tokens, filling, fills_at_once
from ...validation import check_finite
from ..contract import CheckedCall, Decide, Result
from ..inputs import tables_of

R = TypeVar("R")


def prompt(call: CheckedCall, cache: KVCache, decide: Decide) -> Result | None:
    """`contract.Backend.prompt`. None unless every sequence takes all new tokens, and each has one query."""
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    if call.counts is not None or q.shape[2] != k.shape[2] or call.params.attn_mask is not None:
        return None
    if cache.config.stored_prefill or not fills_at_once(cache, k.shape[2]):
        return None
    decided = decide()

    def run(step: Step, fresh: Tensor | None) -> Result:
        return step.run(q, k, v, cache.lengths, fresh, call.params)

    try:
        return _filled(cache, k, decided, run)
    except NonFiniteError:
        for name, x in (("k_new", k), ("v_new", v), ("q", q)):
            check_finite(name, x)  # reports which values
        raise


def append(cache: KVCache, k: Tensor, v: Tensor) -> bool:
    """`kv.quantizer.Quantizer.append` for all of k and v."""
    if refusal(cache.config, k.dtype) or not fills_at_once(cache, k.shape[2]):
        return False
    decided, first = None, deciding_tokens(cache, k.shape[2])
    try:
        if first:
            staged = stage(cache, k[:, :, :first], v[:, :, :first], None)
            decided = Decided(staged.k_mean, compression_of(cache, staged))
        _filled(cache, k, decided, lambda step, fresh: step.append(k, v, cache.lengths, fresh))
    except NonFiniteError:  # the general path names the values
        return False
    return True


def _filled(cache: KVCache, k: Tensor, decided: Decided | None, run: Callable[[Step, Tensor | None], R]) -> R:
    """Run a step that stores k [B, Hkv, T, D] and its values, and count the tokens."""
    config = cache.config
    with filling(cache, k.shape[2], decided, k.device, k.dtype) as new:
        table = cache.page_table
        assert table is not None
        start = table.counts * config.block_size
        mean = None if cache.k_mean is None else cache.k_mean.contiguous()
        step = Step(config, tables_of(table), start, new.codes, new.scales, mean, cache.mean_from, cache.k_order)
        return run(step, new.pages if new.pages.shape[1] else None)
