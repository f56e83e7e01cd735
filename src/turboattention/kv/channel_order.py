"""The order of K's channels in a cache: those that attention asks most of come first, and are stored wider.

What rounding channel c of K costs is about `E[q_c^2]` times the square of its step, which grows with the channel's
spread. So a head's channels are put in the order of `E[q_c^2] var(k_c)`, once, when its first block is compressed, and
the first half gets the wider codes (`kv.layout`). The order is one permutation per KV head for all sequences of a
cache; queries take it too, so that no product changes. Where a head's channels hardly differ, one width errs less than
two: its halves are then coded alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALVES_PAY = 3.2
"""Two widths (4/2 in place of 3, 3/1 of 2) err less than one where the first half weighs more than this times the
second: by the errors of the best uniform quantizers of a normal variable (Max 1960), .363, .119, .0374 and .0115 at 1
to 4 bits, the pairs break even at 3.15 and 3.0."""


_LARGEST = 1e18
"""Of a magnitude that is read (`turboattention.validation`)."""


class ChannelOrder(NamedTuple):
    """places: int64 [Hkv, D], at each place the channel that is stored there; halved: bool [Hkv] (CPU), the heads whose
    halves get two widths."""

    places: Tensor
    halved: Tensor


def query_energy(q: Tensor, counted: Tensor, kv_heads: int) -> Tensor:
    """Sums of `q_c^2` float64 [Hkv, D] over sequences, query rows and the query heads of each KV head.

    q [B, Hq, Lq, D]; counted bool [B, Lq] (CPU): the rows that count. One that is not finite, or beyond 1e18 in
    magnitude, counts as zeros: steps on a GPU tell of it later.
    """
    counts = counted.to(q.device)[:, None, :, None] & (q.abs() <= _LARGEST).all(-1, keepdim=True)
    squares = torch.where(counts, q.double(), 0.0).square()
    return squares.sum((0, 2)).unflatten(0, (kv_heads, -1)).sum(1)


def channel_order(keys: Tensor, energy: Tensor | None) -> ChannelOrder:
    """The order that a cache's first compressed blocks ask for.

    keys [N, Hkv, B, D], the first blocks that are compressed, as stored (their mean does not matter); energy float64
    [Hkv, D] from `query_energy`, or None where no queries were seen: then the keys' spread alone decides.
    """
    spread = keys.double().var(2, correction=0).mean(0)
    weight = spread if energy is None else spread * energy.to(spread.device)
    places = weight.argsort(dim=-1, descending=True, stable=True)
    first, second = weight.gather(-1, places).unflatten(-1, (2, -1)).mean(-1).unbind(-1)
    return ChannelOrder(places, (first > HALVES_PAY * second).cpu())


def reorder(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """x [..., Hkv, ..., D], whose dimension `heads_dim` is the heads, with its channels in `order` [Hkv, D]."""
    shape = [1] * x.dim()
    shape[heads_dim], shape[-1] = order.shape
    return x.gather(-1, order.to(x.device).view(shape).expand_as(x))


def restore_order(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """Inverse of `reorder`."""
    return reorder(x, order.argsort(-1), heads_dim)
