"""Where a prefill's time goes on this CPU, phase by phase, and what its softmax would take in 16-bit integers.

`python benchmarks/prefill_phases.py` prints the table of docs/performance.md. It needs a C++ compiler and AVX2.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
HEAD_DIMS = (64, 128)
REPEATS = 400
FRACTION = 12
"""Bits behind the point of a logit's distance to the maximum, in octaves."""

Array = np.ndarray


def fit(degree: int) -> Array:
    """2^-f = 1 - f (c0 - f (c1 - f c2)) on [0, 1], c2 = 0 for a square: int32 [3], in units of 2^-16."""
    f = 0.5 - 0.5 * np.cos((np.arange(400) + 0.5) * np.pi / 400)
    rows = np.stack([(-1) ** (n + 1) * f**n for n in range(1, degree + 1)], 1)
    found = np.linalg.lstsq(rows * 2.0 ** f[:, None], (1 - 2.0**-f) * 2.0**f, rcond=None)[0]
    return np.pad(np.round(found * 65536), (0, 3 - degree)).astype(np.int32)


def power(y: Array, coefficients: Array) -> Array:
    """2^(-y / 2^FRACTION) in units of 2^-15 for integers 0 <= y < 2^15: products cut to their upper 16 bits."""
    y, (c0, c1, c2) = y.astype(np.int64), coefficients.astype(np.int64)
    f = y % (1 << FRACTION) << (16 - FRACTION)
    a = c0 - ((c1 - (c2 * f >> 16)) * f >> 16)
    return ((0xFFFF - (a * f >> 16)) << 15 - (y >> FRACTION)) >> 16


def largest_error(coefficients: Array) -> float:
    """Of `power`, where the largest weight is 1, over all that 15 bits hold."""
    y = np.arange(1 << 15)
    return float(np.abs(power(y, coefficients) / 2**15 - 2.0 ** (-y / (1 << FRACTION))).max())


class Kernels:
    """The compiled phases."""

    def __init__(self, folder: Path):
        library = folder / "prefill_phases.so"
        options = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        sources = ["-I", str(ROOT / "csrc/cpu"), str(ROOT / "benchmarks/prefill_phases.cpp")]
        subprocess.run(["c++", *options, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self.queries = int(self._library.queries_at_once())

    def powers(self, y: Array, degree: int) -> Array:
        """`power` by vectors: y uint16, as many as a multiple of 32."""
        y, out, c = np.ascontiguousarray(y, np.uint16), np.empty(len(y), np.uint16), fit(degree)
        self._library.powers(y.ctypes, out.ctypes, len(y), degree, c.ctypes)
        return out

    def times(self, head_dim: int, repeats: int) -> list[float]:
        """Nanoseconds for a group of queries and a block of keys, as prefill_phases.cpp lists them."""
        out = np.empty(7)
        self._library.time_phases(head_dim, fit(2).ctypes, fit(3).ctypes, repeats, out.ctypes)
        return out.tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(Path(folder))
        times = [kernels.times(head_dim, REPEATS) for head_dim in HEAD_DIMS]
    print(f"{kernels.queries} queries, 64 keys\n")
    print("| | " + " | ".join(f"head_dim {d}" for d in HEAD_DIMS) + " |\n" + "|---" * (len(HEAD_DIMS) + 1) + "|")
    softmax = [t[1] + t[2] for t in times]
    products = [t[0] + t[4] for t in times]
    rows = {
        "scores, ns": [f"{t[0]:.0f}" for t in times],
        "logits and maximum, ns": [f"{t[1]:.0f}" for t in times],
        "weights, ns": [f"{t[2]:.0f}" for t in times],
        "outputs, ns": [f"{t[4]:.0f}" for t in times],
        "softmax, share": [f"{100 * s / (s + p):.0f} %" for s, p in zip(softmax, products, strict=True)],
        "upper bound of the speedup": [f"{(s + p) / p:.2f}x" for s, p in zip(softmax, products, strict=True)],
        "logits and weights with a scale per row, ns": [f"{t[3]:.0f}" for t in times],
        "logits and weights in 16 bits, quadratic, ns": [f"{t[5]:.0f}" for t in times],
        "the same, cubic, ns": [f"{t[6]:.0f}" for t in times],
        "speedup from 16 bits, cubic": [
            f"{(s + p) / (t[6] + p):.2f}x" for t, s, p in zip(times, softmax, products, strict=True)
        ],
    }
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    for degree in (2, 3):
        print(f"\ndegree {degree}: {fit(degree).tolist()}, largest error {largest_error(fit(degree)):.2e}")


if __name__ == "__main__":
    main()
