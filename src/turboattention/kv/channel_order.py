"""The order of K's channels in compressed pages: the most important channels come first and get wider codes.

Rounding channel c of K causes an error in the logits of about `E[q_c^2]` times the square of its step, and the step
grows with the channel's standard deviation. Therefore the half of a head's channels with the largest
`E[q_c^2] var(k_c)` comes first and gets wider codes (`kv.layout`); within a half, the order does not matter and is
ascending. The order is given (from a calibration), or found once, when the cache's first block is compressed. All
sequences of a cache use one permutation per KV head. If the channels of a head differ little, one width has a lower
error than two. Such heads, and heads of 8 bits, have no order: they are stored as without this option.

INT8 rows (sinks, buffer) are rotated, which makes all channels alike. Keys of ordered heads are therefore rotated back
when they are compressed (`ordered_rows`), and queries of ordered pages are permuted instead of rotated, so dot products
do not change.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import ConfigError, DtypeError, InputError, ShapeError
from ..flashq import quantize_tokens, rotate
from ..uploads import upload
from .layout import K_HALVES

HALVES_PAY = 3.2
"""Ratio of the mean weights of the two halves above which two widths (5/3 for 4, 4/2 for 3, 3/1 for 2) are used.

From the mean squared errors of optimal uniform quantizers of a normal variable, .363, .119, .0374, .0115 and .0035 at 1
to 5 bits (Max 1960), the pairs break even at ratios of 3.26, 3.15 and 3.0.
"""


_LARGEST = 1e18
"""Largest magnitude that is accepted (`turboattention.validation`)."""


class ChannelOrder(NamedTuple):
    """The order of K's channels in compressed pages, one for all sequences of a cache.

    permutation: uint8 [Hkv, D] (int16 if D is above 256), `permutation[h, i]` is the channel of K stored at index i.
    halved: bool [Hkv] (CPU), which heads have two widths; only those are stored in this order.
    """

    permutation: Tensor
    halved: Tensor

    def at(self, head_bits: Tensor) -> ChannelOrder:
        """A copy for heads of these widths (int64 [2, Hkv]): only some widths of K can be halved."""
        able = torch.tensor([int(bits) in K_HALVES for bits in head_bits[0]])
        return ChannelOrder(self.permutation.clone(), self.halved & able)

    def of_heads(self, heads: slice) -> ChannelOrder:
        """The order of some of the heads."""
        return ChannelOrder(self.permutation[heads], self.halved[heads])

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.permutation.nbytes + self.halved.nbytes

    @property
    def table(self) -> Tensor:
        """For kernels: int32 [Hkv, D], contiguous, -1 in heads that are not stored in this order."""
        return torch.where(self.halved[:, None], self.permutation.to(torch.int32), -1).contiguous()


def permutation_dtype(head_dim: int) -> torch.dtype:
    """The dtype of `ChannelOrder.permutation`."""
    return torch.uint8 if head_dim <= 256 else torch.int16


def is_permutation(permutation: Tensor) -> bool:
    """Whether each row of integers [Hkv, D] (CPU) has every channel once."""
    return torch.equal(
        permutation.long().sort(-1).values, torch.arange(permutation.shape[1]).expand(len(permutation), -1)
    )


def by_halves(permutation: Tensor) -> Tensor:
    """The same two halves of channels [Hkv, D], each in ascending order."""
    return permutation.unflatten(-1, (2, -1)).sort(-1).values.flatten(-2)


def packed(permutation: Tensor) -> Tensor:
    """What `unpacked` needs, in few bytes: bit `c % 8` of byte `c // 8` is set for channels of the first half, uint8
    [Hkv, D / 8]. Given orders whose halves are not ascending stay as they are."""
    head_dim = permutation.shape[-1]
    first = torch.zeros_like(permutation, dtype=torch.uint8).scatter_(-1, permutation[:, : head_dim // 2].long(), 1)
    bits = (first.unflatten(-1, (-1, 8)) * 2 ** torch.arange(8, device=permutation.device)).sum(-1).to(torch.uint8)
    return bits if torch.equal(unpacked(bits, head_dim), permutation) else permutation.clone()


def unpacked(stored: Tensor, head_dim: int) -> Tensor:
    """`ChannelOrder.permutation` from what `packed` returned."""
    if stored.shape[-1] == head_dim:
        return stored
    first = (stored[..., None] // 2 ** torch.arange(8, device=stored.device)).flatten(-2) % 2
    return first.argsort(dim=-1, descending=True, stable=True).to(permutation_dtype(head_dim))


def check_order(
    order: ChannelOrder | None, config: TurboConfig, heads: int, head_dim: int, name: str = "k_order"
) -> ChannelOrder | None:
    """A calibrated order of K's channels, on the CPU; None without one, or if `config` compresses no K to fewer than 8
    bits. Raises ConfigError, ShapeError, DtypeError, InputError."""
    if order is None:
        return None
    if not config.reorder_k:
        raise ConfigError(f"{name}: expected none, because reorder_k is off, got an order")
    if not isinstance(order, ChannelOrder):
        raise ConfigError(f"{name}: expected a ChannelOrder, got {type(order).__name__}")
    permutation, halved = (x.detach().cpu() for x in order)
    if permutation.shape != (heads, head_dim) or halved.shape != (heads,):
        raise ShapeError(
            f"{name}: expected shapes ({heads}, {head_dim}) and ({heads},), got {tuple(permutation.shape)} and "
            f"{tuple(halved.shape)}"
        )
    if permutation.is_floating_point() or halved.dtype != torch.bool:
        raise DtypeError(f"{name}: expected integers and bool, got {permutation.dtype} and {halved.dtype}")
    if head_dim % 16 and bool(halved.any()):
        raise InputError(
            f"{name}: expected no heads of two widths at a head_dim of {head_dim}, which is not a multiple of 16"
        )
    if not is_permutation(permutation):
        raise InputError(f"{name}: expected a permutation of {head_dim} channels for each head, got another tensor")
    return ChannelOrder(permutation.to(permutation_dtype(head_dim)), halved.clone()) if config.reorders_k else None


def query_energy(q: Tensor, counted: Tensor, kv_heads: int) -> Tensor:
    """Sums of `q_c^2` float64 [Hkv, D] over sequences, query rows and the query heads of each KV head.

    q: [B, Hq, Lq, D]; counted: bool [B, Lq] (CPU), the rows to include. Rows with a value that is not finite or
    above 1e18 in magnitude are ignored here; a GPU reports them on a later call.
    """
    rows = counted.any(0).nonzero().flatten()
    end = int(rows[-1]) + 1 if len(rows) else 0  # a long prompt's other queries are not read
    q, counted = q[:, :, :end], counted[:, :end]
    counts = upload(counted, q.device)[:, None, :, None] & (q.abs() <= _LARGEST).all(-1, keepdim=True)
    squares = torch.where(counts, q.double(), 0.0).square()
    return squares.sum((0, 2)).unflatten(0, (kv_heads, -1)).sum(1)


def key_spread(keys: Tensor) -> Tensor:
    """float64 [Hkv, D]: the mean over blocks of each channel's variance within a block. keys: [N, Hkv, B, D], blocks in
    the model's space (a constant mean does not matter)."""
    return keys.double().var(2, correction=0).mean(0)


def channel_order(keys: Tensor, energy: Tensor | None) -> ChannelOrder:
    """The order of K's channels for a cache, from its first compressed blocks.

    keys: as for `key_spread`. energy: float64 [Hkv, D] from `query_energy`; None if there were no queries, which sorts
    by the variance of the keys.
    """
    spread = key_spread(keys)
    return order_by(spread if energy is None else spread * energy.to(spread.device))


def order_by(weight: Tensor) -> ChannelOrder:
    """The order whose first half has the largest weights `E[q_c^2] var(k_c)`, float [Hkv, D] in any unit."""
    head_dim = weight.shape[-1]
    permutation = weight.argsort(dim=-1, descending=True, stable=True)
    first, second = weight.gather(-1, permutation).unflatten(-1, (2, -1)).mean(-1).unbind(-1)
    pays = (first > HALVES_PAY * second).cpu()
    permutation = by_halves(permutation).to(permutation_dtype(head_dim))
    return ChannelOrder(permutation, pays if head_dim % 16 == 0 else torch.zeros_like(pays))


def ordered_rows(k8: Tensor, k_scale: Tensor, order: ChannelOrder, rotated: bool) -> tuple[Tensor, Tensor]:
    """INT8 keys [N, H, B, D] with scales [N, H, B] float32, as in the buffer, in the form that pages store.

    Rows of ordered heads are dequantized, rotated back (if `rotated`), quantized again and permuted. Products of codes
    and scales, and their sums in float64, are exact, so every implementation gets the same bits.
    """
    codes, scales = k8, k_scale
    if rotated:
        codes, scales = quantize_tokens(rotate(k8.to(k_scale.dtype) * k_scale[..., None], inverse=True))
    return _of_halved(order, (reorder(codes, order.permutation, 1), scales), (k8, k_scale))


def unordered_rows(k8: Tensor, k_scale: Tensor, order: ChannelOrder, rotated: bool) -> tuple[Tensor, Tensor]:
    """Inverse of `ordered_rows`, up to the rounding of INT8."""
    codes, scales = restore_order(k8, order.permutation, 1), k_scale
    if rotated:
        codes, scales = quantize_tokens(rotate(codes.to(k_scale.dtype) * k_scale[..., None]))
    return _of_halved(order, (codes, scales), (k8, k_scale))


def restore_keys(keys: Tensor, order: ChannelOrder | None, rotated: bool) -> Tensor:
    """Dequantized keys [N, H, B, D] of pages, or of INT8 rows (without `order`), in the model's space."""
    unrotated = rotate(keys, inverse=True) if rotated else keys
    if order is None:
        return unrotated
    return torch.where(
        order.halved.to(keys.device)[:, None, None], restore_order(keys, order.permutation, 1), unrotated
    )


def _of_halved(order: ChannelOrder, yes: tuple[Tensor, Tensor], no: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    halved = order.halved.to(no[0].device)[:, None]
    return torch.where(halved[..., None], yes[0], no[0]), torch.where(halved, yes[1], no[1])


def reorder(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """Permute the channels of x [..., Hkv, ..., D] to `order`, integers [Hkv, D]; dimension `heads_dim` is Hkv."""
    shape = [1] * x.dim()
    shape[heads_dim], shape[-1] = order.shape
    return x.gather(-1, order.to(x.device, torch.int64).view(shape).expand_as(x))


def restore_order(x: Tensor, order: Tensor, heads_dim: int) -> Tensor:
    """Inverse of `reorder`."""
    return reorder(x, order.argsort(-1), heads_dim)
