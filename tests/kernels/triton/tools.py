"""What tests of the Triton kernels share: a call on both backends, or a skip that says why."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from torch import Tensor

import turboattention as ta
from turboattention.kv.cache import KVCache

from ..cpu.attending import Pair, assert_close

__all__ = ["Pair", "assert_close", "cache_both", "prefill_both"]


def prefill_both(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Pair:
    """`turbo_attention` by the kernels, checked against the reference."""
    got = ta.turbo_attention(q, k, v, *args, return_lse=True, backend="triton", **options)
    assert_close(got, ta.turbo_attention(q, k, v, *args, return_lse=True, backend="reference", **options))
    return got


def cache_both(q: Tensor, cache: KVCache, *new: Tensor, **options: Any) -> Pair:
    """`turbo_attention_with_kvcache` by the kernels, checked against the reference on a clone."""
    other = cache.clone()
    got = ta.turbo_attention_with_kvcache(q, cache, *new, return_lse=True, backend="triton", **options)
    assert_close(got, ta.turbo_attention_with_kvcache(q, other, *new, return_lse=True, backend="reference", **options))
    return got
