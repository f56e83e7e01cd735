"""The correctness check: contenders with wrong results are not timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.exact import exact_attention

_ROWS = 32
"""Query rows compared at each of three positions; all rows would need the whole score matrix."""


class WrongResultError(Exception):
    """The error of a contender relative to exact attention is beyond its bound."""


@dataclass(frozen=True)
class Expected:
    """Exact attention at some query rows: slices of the query axis and float64 [B, Hq, rows, D]."""

    rows: list[slice]
    values: list[Tensor]

    def error(self, out: Tensor) -> float:
        """Relative error (Frobenius) of `out` [B, Hq, Lq, D] over those rows; infinite unless all are finite."""
        got = torch.cat([out[:, :, rows].to(torch.float64) for rows in self.rows], 2)
        want = torch.cat(self.values, 2)
        if got.shape != want.shape or not bool(got.isfinite().all()):
            return float("inf")
        return float((got - want).norm() / want.norm())


def expect(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Expected:
    """Exact attention at the first, middle and last rows. Causal is aligned to the bottom right."""
    queries, keys = q.shape[2], k.shape[2]
    starts = sorted({0, max(0, (queries - _ROWS) // 2), max(0, queries - _ROWS)})
    rows = [slice(start, min(start + _ROWS, queries)) for start in starts]
    values = []
    for part in rows:
        seen = keys - queries + part.stop if causal else keys
        values.append(exact_attention(q[:, :, part], k[:, :, :seen], v[:, :, :seen], is_causal=causal)[0])
    return Expected(rows, values)


def check(name: str, out: Tensor, expected: Expected, bound: float) -> float:
    """The relative error of a result.

    Raises:
        WrongResultError: it is beyond the bound, or not finite.
    """
    error = expected.error(out)
    if not error <= bound:
        raise WrongResultError(f"{name}: relative error {error:.3g} against exact attention, above its bound {bound:g}")
    return error
