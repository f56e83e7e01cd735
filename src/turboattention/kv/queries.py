"""Stage 1 of queries: rotation, quantization, and the logits that smoothing removed from keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..flashq import quantize_int8, rotate
from ..flashq.symmetric import compute_dtype
from .channel_order import reorder


@dataclass(frozen=True)
class Queries:
    """INT8 queries, grouped by KV head.

    codes: [B, Hkv, g, Lq, D], integers in a float dtype, whose products are exact.
    scale: [B, Hkv, g, Lq], includes the softmax scale; a logit is `scale * key scale * (codes . key codes)`.
    mean_logit: [B, Hkv, g, Lq], `scale q . mu`, to add for keys stored without their mean; None without smoothing.
    """

    codes: Tensor
    scale: Tensor
    mean_logit: Tensor | None


def quantize_queries(
    config: TurboConfig, q: Tensor, kv_heads: int, scale: float, k_mean: Tensor | None, k_order: Tensor | None = None
) -> Queries:
    """Quantize q [B, Hq, Lq, D], which must be finite.

    k_mean: [B, Hkv, D] in stored space, or None. k_order: int64 [Hkv, D], the order of K's channels, or None.
    """
    q = compute_dtype(q)
    if config.rotates_k:
        q = rotate(q)
    group = q.shape[1] // kv_heads
    if k_order is not None:
        q = reorder(q.unflatten(1, (-1, group)), k_order, 1).flatten(1, 2)
    # With token scales a tile is one row; else the paper's tiles, starting at the first row of the call.
    tile = 1 if config.token_scales else config.block_size
    codes, scales = quantize_int8(q, tile)
    rows = scales.repeat_interleave(tile, -1)[..., : q.shape[2]] if tile > 1 else scales
    mean_logit = None
    if k_mean is not None:
        # In float64, so that the float32 result does not depend on the order of summation.
        product = torch.einsum("bhgld,bhd->bhgl", q.unflatten(1, (-1, group)).double(), k_mean.double())
        mean_logit = (scale * product).to(q.dtype)
    return Queries(codes.to(q.dtype).unflatten(1, (-1, group)), (rows * scale).unflatten(1, (-1, group)), mean_logit)
