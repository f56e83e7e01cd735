"""TurboQuant-MSE (Zandieh et al., arXiv 2504.19874): a random rotation, then one codebook for every coordinate.

Algorithm 1: ``y = P x`` with P a random orthogonal matrix (Q of the QR of a Gaussian one), each ``y_j`` to its
nearest centroid, and back ``P^T c``. A coordinate of a random unit vector has density proportional to
``(1 - y^2)^((d - 3) / 2)`` (lemma 1); the centroids are those of its best scalar quantizer (Lloyd-Max, equation 4).
Vectors are divided by their norm first, which is stored with them: bits + 16 / D per element. No window.
Assumed: the norm is stored in float16, and one P serves all layers and heads. Not included: the paper's split of
channels into outliers and others for 2.5 and 3.5 bits, and the QJL stage of its inner-product variant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .stream import FLOAT_BITS, Restored, as_half


@dataclass(frozen=True)
class TurboQuantMse:
    bits: int
    seed: int = 0

    def settled(self, length: int) -> int:
        return length

    def __call__(self, x: Tensor, start: int) -> Restored:
        head_dim = x.shape[3]
        rotation = random_rotation(head_dim, self.seed).to(x)
        centroids = codebook(head_dim, self.bits).to(x)
        norm = as_half(x.norm(dim=3, keepdim=True))
        unit = x / norm.where(norm > 0, 1.0) @ rotation.T
        nearest = torch.bucketize(unit, (centroids[1:] + centroids[:-1]) / 2)
        values = norm * (centroids[nearest] @ rotation)
        return Restored(values, self.bits * x.numel() + FLOAT_BITS * norm.numel())


@functools.lru_cache(maxsize=32)
def random_rotation(head_dim: int, seed: int) -> Tensor:
    """Orthogonal float64 [D, D]: Q of a Gaussian matrix from `seed`."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(head_dim, head_dim, generator=seeded, dtype=torch.float64)).Q


@functools.lru_cache(maxsize=32)
def codebook(head_dim: int, bits: int) -> Tensor:
    """float64 [2^bits] centroids, ascending, for a coordinate of a random unit vector in `head_dim` dimensions.

    Lloyd-Max on the density: boundaries halfway between centroids, centroids at the means between boundaries.
    """
    # Integrals are sums over a fine grid up to 12 standard deviations, beyond which the density is negligible.
    reach = min(1.0, 12 * head_dim**-0.5)
    at = torch.linspace(-reach, reach, 200_001, dtype=torch.float64)
    density = (1 - at**2).clamp(min=0) ** ((head_dim - 3) / 2)
    mass = torch.cat([torch.zeros(1).double(), density.cumsum(0)])
    moment = torch.cat([torch.zeros(1).double(), (density * at).cumsum(0)])
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    centroids = at[torch.searchsorted(mass[1:], quantiles * mass[-1])]
    for _ in range(2000):
        edges = torch.searchsorted(at, (centroids[1:] + centroids[:-1]) / 2)
        edges = torch.cat([torch.tensor([0]), edges, torch.tensor([len(at)])])
        moved = moment[edges].diff() / mass[edges].diff()
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return (centroids - centroids.flip(0)) / 2
