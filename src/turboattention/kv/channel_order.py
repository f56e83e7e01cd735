"""The order of K's channels in a cache: the most important channels come first and get wider codes.

Rounding channel c of K causes an error in the logits of about `E[q_c^2]` times the square of its step, and the step
grows with the channel's standard deviation. Therefore a head's channels are sorted by decreasing `E[q_c^2] var(k_c)`,
once, when the cache's first block is compressed, and the first half gets wider codes (`kv.layout`). All sequences of a
cache use one permutation per KV head. Queries are permuted too, so dot products do not change. If the channels of a
head differ little, one width has a lower error than two, and both halves get the same width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALVES_PAY = 3.2
"""Ratio of the mean weights of the two halves above which two widths (4/2 for 3, 3/1 for 2) are used.

From the mean squared errors of optimal uniform quantizers of a normal variable, .363, .119, .0374 and .0115 at 1 to 4
bits (Max 1960), the pairs break even at ratios of 3.15 and 3.0.
"""


_LARGEST = 1e18
"""Largest magnitude that is accepted (`turboattention.validation`)."""


class ChannelOrder(NamedTuple):
    """places: int64 [Hkv, D], the channel stored at each place; halved: bool [Hkv] (CPU), whether a head has two
    widths."""

    places: Tensor
    halved: Tensor


def query_energy(q: Tensor, counted: Tensor, kv_heads: int) -> Tensor:
    """Sums of `q_c^2` float64 [Hkv, D] over sequences, query rows and the query heads of each KV head.

    q: [B, Hq, Lq, D]; counted: bool [B, Lq] (CPU), the rows to include. Rows with a value that is not finite or
    above 1e18 in magnitude are ignored here; a GPU reports them on a later call.
    """
    counts = counted.to(q.device)[:, None, :, None] & (q.abs() <= _LARGEST).all(-1, keepdim=True)
    squares = torch.where(counts, q.double(), 0.0).square()
    return squares.sum((0, 2)).unflatten(0, (kv_heads, -1)).sum(1)


def channel_order(keys: Tensor, energy: Tensor | None) -> ChannelOrder:
    """The order of K's channels for a cache.

    keys: [N, Hkv, B, D], the first compressed blocks as stored (a constant mean does not matter). energy: float64
    [Hkv, D] from `query_energy`; None if there were no queries, which sorts by the variance of the keys.
    """
    spread = keys.double().var(2, correction=0).mean(0)
    weight = spread if energy is None else spread * energy.to(spread.device)
    places = weight.argsort(dim=-1, descending=True, stable=True)
    first, second = weight.gather(-1, places).unflatten(-1, (2, -1)).mean(-1).unbind(-1)
    return ChannelOrder(places, (first > HALVES_PAY * second).cpu())


def reorder(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """Permute the channels of x [..., Hkv, ..., D] to `order` int64 [Hkv, D]; dimension `heads_dim` is the heads."""
    shape = [1] * x.dim()
    shape[heads_dim], shape[-1] = order.shape
    return x.gather(-1, order.to(x.device).view(shape).expand_as(x))


def restore_order(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """Inverse of `reorder`."""
    return reorder(x, order.argsort(-1), heads_dim)
