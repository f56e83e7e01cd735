"""PyTorch's ways to attend on a GPU, each at its best: SDPA's flash and cuDNN backends, and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboattention.benchmarking.sdpa import can_fold

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefill(causal: bool) -> dict[str, Attend]:
    """By name; each takes q [B, Hq, L, D], k, v [B, Hkv, L, D]."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if not torch.cuda.is_available():
        return {"math": functools.partial(_sdpa, SDPBackend.MATH, causal)}
    ways: dict[str, Attend] = {name: functools.partial(_sdpa, backend, causal) for name, backend in backends.items()}
    return ways | {"flex": functools.partial(_flex, causal)}


def decode() -> dict[str, Attend]:
    """By name; each takes q [B, Hq, 1, D]. Query heads of a group also as rows of one head, which is
    faster for some."""
    ways = prefill(causal=False)
    return ways | {f"{name}, heads as rows": functools.partial(_folded, way) for name, way in ways.items()}


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
