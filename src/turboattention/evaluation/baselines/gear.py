"""GEAR-L (Kang et al., arXiv 2403.05527): a quantized backbone plus a low-rank approximation of its error.

X ~ D + L with ``L = A B^T`` of rank r, per head, from the error ``X - D`` by power iteration (sections 3 and 4,
"SVDSolver"). GEAR-L is GEAR without its sparse outliers. Settings are those of the authors' own runs of LLaMA3-8B
on GSM8K: rank 4 for the prompt and 2 for later groups, three iterations, a streaming buffer of n_b = 64 tokens;
backbone KCVT at 4 bits, KIVI with groups of 64 at 2 bits.

Assumed: factors are stored in float16; tokens of the prompt beyond its last complete group of n_b wait in the buffer
like generated ones; the iteration starts from uniform random numbers of one fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .groups import min_max, min_max_along
from .stream import FLOAT_BITS, Restored, as_half


@dataclass(frozen=True)
class GearL:
    """K (``axis="channel"``) or V (``axis="token"``) of GEAR-L.

    group: values per scale along the axis's groups, as in KIVI; None is KCVT: keys have one scale per channel over
        all tokens compressed together, values one per token over all heads.
    """

    axis: Literal["channel", "token"]
    bits: int
    group: int | None = None
    prompt_rank: int = 4
    rank: int = 2
    iterations: int = 3
    buffer: int = 64

    def settled(self, length: int) -> int:
        return length - length % self.buffer

    def __call__(self, x: Tensor, start: int) -> Restored:
        if start == 0:
            return self._compress(x, self.prompt_rank)
        parts = [self._compress(part, self.rank) for part in x.split(self.buffer, 2)]
        return Restored(torch.cat([part.values for part in parts], 2), sum(part.bits for part in parts))

    def _compress(self, x: Tensor, rank: int) -> Restored:
        backbone, bits = self._backbone(x)
        left, right = low_rank(x - backbone, rank, self.iterations)
        values = backbone + left @ right.transpose(2, 3)
        return Restored(values, bits + FLOAT_BITS * (left.numel() + right.numel()))

    def _backbone(self, x: Tensor) -> Restored:
        if self.group is None:
            return min_max(x, self.bits, 2 if self.axis == "channel" else (1, 3))
        return min_max_along(x, self.bits, 2 if self.axis == "channel" else 3, self.group)


def low_rank(error: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors A [B, H, T, r] and B [B, H, D, r], ``error ~ A B^T`` per head, rounded to float16.

    Power iteration: ``A = E B``, ``B = E^T A``, with B and A made orthonormal in the last round.
    """
    batch, heads, tokens, head_dim = error.shape
    rank = min(rank, tokens, head_dim)
    seeded = torch.Generator().manual_seed(0)
    right = torch.rand(batch, heads, head_dim, rank, generator=seeded).to(error)
    left = error @ right
    for step in range(iterations):
        last = step == iterations - 1
        left = error @ (torch.linalg.qr(right).Q if last else right)
        left = torch.linalg.qr(left).Q if last else left
        right = error.transpose(2, 3) @ left
    return as_half(left), as_half(right)
