"""Head priority, gap x std, which selects the heads stored at 2 bits (paper section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError


def head_priority(k: Tensor) -> Tensor:
    """The paper's priority of each KV head, from keys or values before smoothing and rotation.

    Args:
        k: [B, Hkv, L, D] float, L >= 1.

    Returns:
        float [Hkv], the mean over the batch of `gap * std`: `gap` is max - min over the whole head, `std` the
        population standard deviation over channels of each channel's max - min.

    Raises:
        ShapeError: k is empty, or does not have four dimensions.

    Source: TurboAttention (arXiv 2412.08585), section 3.2.
    """
    if k.dim() != 4 or 0 in k.shape:
        raise ShapeError(f"k: expected a non-empty [batch, kv_heads, tokens, head_dim], got shape {tuple(k.shape)}")
    k = k if k.dtype == torch.float64 else k.to(torch.float32)
    high, low = k.amax(2), k.amin(2)
    gap = high.amax(-1) - low.amin(-1)
    spread = (high - low).std(-1, correction=0)
    return (gap * spread).mean(0)


def assign_head_bits(priority: Tensor, low_bit_fraction: float = 0.5) -> Tensor:
    """The widths of heads, int64 [Hkv]: 2 bits for the `floor(low_bit_fraction * Hkv)` heads of lowest priority, 4 for
    the others.

    priority: float [Hkv] (`head_priority`). Of heads with equal priority, those with the lower index get 2 bits first.
    Raises ShapeError unless `priority` is a vector, ConfigError unless the fraction is from 0 to 1.

    Source: TurboAttention (arXiv 2412.08585), section 3.2.
    """
    if priority.dim() != 1:
        raise ShapeError(f"priority: expected [kv_heads], got shape {tuple(priority.shape)}")
    if not 0 <= low_bit_fraction <= 1:
        raise ConfigError(f"low_bit_fraction: expected a number from 0 to 1, got {low_bit_fraction!r}")
    count = math.floor(low_bit_fraction * len(priority))
    bits = torch.full_like(priority, 4, dtype=torch.int64)
    bits[torch.argsort(priority, stable=True)[:count]] = 2
    return bits
