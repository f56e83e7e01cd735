"""Stage 1 of the queries: rotated, quantized, with what smoothing took off their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..flashq import quantize_int8, rotate
from ..flashq.symmetric import compute_dtype
from ..kv.channel_order import reorder


@dataclass(frozen=True)
class Queries:
    """INT8 queries, grouped by KV head.

    codes: integers held in float [B, Hkv, g, Lq, D] (products of such are exact); scale
    [B, Hkv, g, Lq]: the logit of one unit of a product with an INT8 key, key scale apart;
    mean_logit [B, Hkv, g, Lq]: `scale q . mu`, what keys stored without their mean lack, or None.
    """

    codes: Tensor
    scale: Tensor
    mean_logit: Tensor | None


def logit_scale(scale: float | None, head_dim: int) -> float:
    """`1 / sqrt(D)` unless given."""
    return head_dim**-0.5 if scale is None else float(scale)


def quantize_queries(
    config: TurboConfig, q: Tensor, kv_heads: int, scale: float, k_mean: Tensor | None, k_order: Tensor | None = None
) -> Queries:
    """Queries q [B, Hq, Lq, D], every row finite; `k_mean` [B, Hkv, D] in the space that keys are stored in, and
    `k_order` int64 [Hkv, D] the order of their channels there (None: as they are)."""
    q = compute_dtype(q)
    if config.rotates_k:
        q = rotate(q)
    group = q.shape[1] // kv_heads
    if k_order is not None:
        q = reorder(q.unflatten(1, (-1, group)), k_order, 1).flatten(1, 2)
    # One row a tile with token scales; else the paper's tiles, counted from the call's first row.
    tile = 1 if config.token_scales else config.block_size
    codes, scales = quantize_int8(q, tile)
    rows = scales.repeat_interleave(tile, -1)[..., : q.shape[2]] if tile > 1 else scales
    mean_logit = None
    if k_mean is not None:
        # In float64, so that its float32 form does not depend on how many rows are summed at once.
        product = torch.einsum("bhgld,bhd->bhgl", q.unflatten(1, (-1, group)).double(), k_mean.double())
        mean_logit = (scale * product).to(q.dtype)
    return Queries(codes.to(q.dtype).unflatten(1, (-1, group)), (rows * scale).unflatten(1, (-1, group)), mean_logit)
