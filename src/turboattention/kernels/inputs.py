"""What attention kernels read beside the queries, and which configurations they compute: the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..kv.layout import PageLayout

BLOCK = 64
"""The only block size that the kernels are written for."""


@dataclass(frozen=True)
class Pages:
    """Page tables of a batch.

    addresses: int64 [B, P], 0 where evicted. counts: int64 [B]. sink_blocks: the first blocks of a sequence, which have
    the layout `sinks`; later ones have the layout `compressed`, which may be missing while there are none. alive:
    tensors that addresses point into, if nothing else holds them.
    """

    addresses: Tensor
    counts: Tensor
    sink_blocks: int
    sinks: PageLayout
    compressed: PageLayout | None
    alive: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class TailRows:
    """INT8 rows behind the pages: k8 int8 [B, H, W, D], v8 int8 [B, H, W, Dv], scales float32 [B, H, W] (on GPUs of any
    float dtype), all contiguous; row 0 is position `start[b]` (int64 [B], multiples of 64)."""

    k8: Tensor
    v8: Tensor
    k_scale: Tensor
    v_scale: Tensor
    start: Tensor


@dataclass(frozen=True)
class Int8Queries:
    """Queries quantized already: codes int8 [B, Hkv, g, Lq, D] (rotated), unit float32 [B, Hkv, g, Lq]
    (logits' scale included), mean_logit float32 likewise or None; ordered_codes, ordered_unit: the same queries for
    compressed pages, where these have an order of channels (`kv.channel_order`), or None; all contiguous."""

    codes: Tensor
    unit: Tensor
    mean_logit: Tensor | None
    ordered_codes: Tensor | None = None
    ordered_unit: Tensor | None = None


@dataclass(frozen=True)
class QueryPositions:
    """Positions of query rows: row i of sequence b has position `first[b] + i` among its `lengths[b]` keys. Rows from
    `valid[b]` on are not read; their output is 0 and their lse -inf. int64 [B] each, contiguous."""

    first: Tensor
    valid: Tensor
    lengths: Tensor


GPU_HEAD_DIM = 256
"""Channels of a head that the GPU kernels are written for at most."""


def gpu_refusal(head_dims: tuple[int, int]) -> str | None:
    """Why the GPU kernels do not compute heads of these sizes (of keys and of values), or None."""
    if max(head_dims) > GPU_HEAD_DIM:
        return f"head_dim is {max(head_dims)}, the GPU kernels compute up to {GPU_HEAD_DIM}"
    return None


def refusal(config: TurboConfig, dtype: torch.dtype, **wanted: tuple[object, ...]) -> str | None:
    """Why kernels do not support this, or None. `wanted`: the supported values of further fields of the configuration,
    if a backend's kernels do not support all."""
    if dtype == torch.float64:
        return "inputs are float64, which only the reference supports"
    if config.block_size != BLOCK:
        return f"block_size is {config.block_size}, its kernels are written for {BLOCK}"
    wanted = {"row_max": ("block",), "p_scale": ("row", "static"), "rescale": ("exact",), **wanted}
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            return f"{name} is {getattr(config, name)!r}, its kernels compute {' and '.join(map(repr, values))}"
    return None
