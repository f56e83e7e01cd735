"""Stage 1 of queries: rotation, quantization, and the logits that smoothing removed from keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..flashq import quantize_int8, rotate
from ..flashq.symmetric import compute_dtype
from .channel_order import ChannelOrder, reorder


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


def quantize_queries(config: TurboConfig, q: Tensor, kv_heads: int, scale: float, k_mean: Tensor | None) -> Queries:
    """Quantize q [B, Hq, Lq, D], which must be finite, for INT8 rows and for pages without an order.

    k_mean: [B, Hkv, D] in the space of INT8 rows, or None.
    """
    q = compute_dtype(q)
    if config.rotate:
        q = rotate(q)
    group = q.shape[1] // kv_heads
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


def ordered_queries(
    config: TurboConfig, q: Tensor, kv_heads: int, scale: float, order: ChannelOrder, rows: Queries
) -> Queries:
    """Quantize q [B, Hq, Lq, D] for compressed pages: not rotated but permuted, in heads that `order` applies to.

    rows: the same queries for INT8 rows; other heads take these. The mean's logit is the same for both, because a
    rotation does not change `q . mu`.
    """
    grouped = compute_dtype(q).unflatten(1, (kv_heads, -1))
    codes, scales = quantize_int8(reorder(grouped, order.permutation, 1).flatten(1, 2), 1)
    halved = order.halved.to(q.device)[:, None, None]
    codes = torch.where(halved[..., None], codes.to(rows.codes.dtype).unflatten(1, (kv_heads, -1)), rows.codes)
    unit = torch.where(halved, (scales * scale).unflatten(1, (kv_heads, -1)), rows.scale)
    return Queries(codes, unit, rows.mean_logit)
