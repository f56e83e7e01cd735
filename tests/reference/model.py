"""The default preset's attention in float64 NumPy, one head and one query at a time.

Written from the description (numerics: sections 1 to 6 and the presets) and sharing no code with the
package: token scales, rotation, smoothing, sink block, block-local maximum, weights with a scale per row and
block, exact rescaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..flashq import formulas

BLOCK = 64


def sas(x: float) -> float:
    if x < -9:
        return 0.0
    n = math.floor(-x)
    f = -x - n
    return math.exp(-n) * (-0.1025 * f**3 + 0.4626 * f**2 - 0.9922 * f + 0.9996)


@dataclass
class Sequence:
    """Keys and values of one head: INT8 codes [L, D] and token scales [L], and the mean of K."""

    k8: np.ndarray
    k_scale: np.ndarray
    v8: np.ndarray
    v_scale: np.ndarray
    mean: np.ndarray
    matrix: np.ndarray


def stage1(k: np.ndarray, v: np.ndarray) -> Sequence:
    """k, v [L, D] as they arrive."""
    matrix = formulas.rotation(k.shape[1])
    keys, values = k @ matrix, v @ matrix
    mean = np.zeros(k.shape[1])
    if len(k) >= BLOCK:
        codes, scales = formulas.quantize_rows(keys[:BLOCK])
        mean = formulas.bfloat((codes[4:] * scales[4:, None]).mean(0))
        keys[BLOCK:] -= mean
    return Sequence(*formulas.quantize_rows(keys), *formulas.quantize_rows(values), mean, matrix)


def compress(sequence: Sequence, first: int, last: int, k_bits: int, v_bits: int) -> None:
    """Blocks `first` to `last` become what stage 2 gives back (searched)."""
    for block in range(first, last):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        sequence.k8[rows] = formulas.restored(sequence.k8[rows], k_bits, True)
        sequence.v8[rows] = formulas.restored(sequence.v8[rows], v_bits, True)


def attend(
    q: np.ndarray, sequence: Sequence, seen: np.ndarray, scale: float, softcap: float | None = None, bias=None
) -> tuple[np.ndarray, float]:
    """One query [D] over the keys that `seen` (bool [L]) lets it see: out [D] and lse."""
    query = q @ sequence.matrix
    q_scale = float(np.abs(query).max()) / 119
    q8 = np.rint(query / q_scale)
    out, row_sum, row_max = np.zeros(len(q)), 0.0, -math.inf
    for start in range(0, len(seen), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(seen)))
        if not seen[rows].any():
            continue
        logits = (sequence.k8[rows] @ q8) * q_scale * scale * sequence.k_scale[rows]
        if start >= BLOCK:
            logits = logits + scale * (query @ sequence.mean)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[rows]
        logits = np.where(seen[rows], logits, -math.inf)
        top = logits.max()
        if top == -math.inf:
            continue
        weights = np.array([sas(x - top) for x in logits])
        products = weights * sequence.v_scale[rows]
        unit = products.max() / 126.96875
        codes = np.rint(products / unit)
        new = max(row_max, top)
        old, this = math.exp(row_max - new), math.exp(top - new)
        row_sum = row_sum * old + np.rint(weights * 127 * 256).sum() / (127 * 256) * this
        out = out * old + (codes @ sequence.v8[rows]) * unit * this
        row_max = new
    if row_sum == 0:
        return out, -math.inf
    return (out / row_sum) @ sequence.matrix.T, row_max + math.log(row_sum)
