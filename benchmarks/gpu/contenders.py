"""Peers on a GPU, each at its best: SDPA's flash and cuDNN backends, FlexAttention, and, for decode, a plain split-KV
kernel over floats of 16 bits and of 8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import split_kv
import torch
from timing import once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from turboattention.benchmarking.sdpa import can_fold

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefill(causal: bool) -> dict[str, Attend]:
    """By name; each takes q [B, Hq, L, D], k, v [B, Hkv, L, D]."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if not torch.cuda.is_available():
        return {"math": functools.partial(_sdpa, SDPBackend.MATH, causal)}
    return {name: functools.partial(_sdpa, backend, causal) for name, backend in backends.items()}


def flex(causal: bool) -> dict[str, Attend]:
    """FlexAttention, which is compiled anew for every shape."""
    return {"flex": functools.partial(_flex, causal)}


def decode() -> dict[str, Attend]:
    """By name; each takes q [B, Hq, 1, D]. SDPA's also with the query heads of a group as rows of one head, which is
    faster; the split-KV kernel at the best of its launches for the shape."""
    ways = prefill(causal=False)
    ways |= {f"{name}, heads as rows": functools.partial(_folded, way) for name, way in ways.items()}
    return ways | {"split-KV 16-bit": _split_kv}


def decode_fp8() -> dict[str, Attend]:
    """Over caches that stay as they are: of each an 8-bit copy is made once."""
    return {"split-KV fp8": _split_kv_fp8} if torch.cuda.is_available() else {}


def _split_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return split_kv.attend(q, k, v, _best_split(_Shape.of(q, k)))


def _split_kv_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The conversion, made once a cache, is none of the call's work."""
    k8, v8 = _as_fp8(k), _as_fp8(v)
    return split_kv.attend(q, k8, v8, _best_split(_Shape.of(q, k8)))


def _as_fp8(x: Tensor) -> Tensor:
    """Kept while x lives."""
    found = _FP8.get(x)
    if found is None:
        found = _FP8[x] = x.to(torch.float8_e4m3fn)
    return found


_FP8: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> _Shape:
        return cls(len(q), q.shape[1], *k.shape[1:], q.dtype, k.dtype)


@functools.cache
def _best_split(shape: _Shape) -> split_kv.Launch:
    """The launch of the least time for a shape, on random values."""
    if not torch.cuda.is_available():
        return split_kv.LAUNCHES[0]
    q = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, dtype=shape.dtype, device="cuda")
    size = shape.batch, shape.kv_heads, shape.keys, shape.head_dim
    k, v = (torch.randn(size, dtype=shape.dtype, device="cuda").to(shape.cache_dtype) for _ in range(2))
    times = {}
    for launch in split_kv.LAUNCHES:
        try:
            times[launch] = once(functools.partial(split_kv.attend, q, k, v, launch), 8)
        except Exception:  # one that does not fit
            continue
    return min(times, key=lambda launch: times[launch])


def _sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _folded(way: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not can_fold(q, k.shape[1]):
        return way(q, k, v)
    return way(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v).reshape(q.shape)


def _flex(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _causal_mask(q.shape[2], k.shape[2]) if causal else None
    return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_mask(queries: int, keys: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q + keys - queries >= k, None, None, queries, keys, device="cuda")
