"""TurboAttention as the paper writes it, in float64 NumPy, one head and one tile at a time.

Written from the formulas alone and sharing no code with the package, to check the reference
against: tile-wide scales, half-even rounding, a partial last tile scaled by its own rows, SAS for
weights and for rescaling, the normalizer from unquantized weights.
"""

from __future__ import annotations

import numpy as np

BLOCK = 64


def sas(x: np.ndarray) -> np.ndarray:
    y = np.where(x < -6.0, 0.0, -x)
    n = np.floor(y)
    f = y - n
    value = np.exp(-n) * (((-0.1025 * f + 0.4626) * f - 0.9922) * f + 0.9996)
    return np.where(x < -6.0, 0.0, value)


def quantize(tile: np.ndarray) -> tuple[np.ndarray, float]:
    peak = np.abs(tile).max(initial=0.0)
    scale = peak / 119 if peak > 0 else 1.0
    return np.rint(tile / scale), scale


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, scale: float | None = None) -> np.ndarray:
    """q [Hq, Lq, D], k, v [Hkv, Lk, D] -> [Hq, Lq, D]; causal is bottom-right aligned."""
    out = np.zeros_like(q)
    group = q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        for start in range(0, q.shape[1], BLOCK):
            rows = slice(start, min(start + BLOCK, q.shape[1]))
            out[head, rows] = _tile(q[head, rows], k[head // group], v[head // group], start, q.shape[1], causal, scale)
    return out


def _tile(q, k, v, start, queries, causal, scale):
    keys, head_dim = k.shape
    factor = head_dim**-0.5 if scale is None else scale
    q8, s_q = quantize(q)
    peak = np.full(len(q), -np.inf)
    total = np.zeros(len(q))
    out = np.zeros((len(q), head_dim))
    positions = keys - queries + start + np.arange(len(q))
    for first in range(0, keys, BLOCK):
        columns = np.arange(first, min(first + BLOCK, keys))
        k8, s_k = quantize(k[columns])
        v8, s_v = quantize(v[columns])
        scores = s_q * s_k * factor * (q8 @ k8.T)
        if causal:
            scores = np.where(columns[None] <= positions[:, None], scores, -np.inf)
        new_peak = np.maximum(peak, scores.max(1))
        seen = np.isfinite(new_peak)
        base = np.where(seen, new_peak, 0.0)
        weights = sas(scores - base[:, None])
        p8, s_p = quantize(weights)
        moved = sas(np.where(seen, peak - base, -np.inf))
        total = moved * total + weights.sum(1)
        out = moved[:, None] * out + s_p * s_v * (p8 @ v8)
        peak = new_peak
    return out / np.where(total > 0, total, 1.0)[:, None]
