"""The time of prefill on this CPU by phase, with the softmax in floating point and in fixed point.

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

Array = np.ndarray


class Kernels:
    """The compiled phases."""

    def __init__(self, folder: Path):
        library = folder / "prefill_phases.so"
        options = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        sources = ["-I", str(ROOT / "csrc/cpu"), str(ROOT / "benchmarks/prefill_phases.cpp")]
        subprocess.run(["c++", *options, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self.queries = int(self._library.queries_at_once())

    def powers(self, y: Array) -> Array:
        """`turboattention.softmax.sas16_power` by vectors: y uint16, as many as a multiple of 32."""
        y, out = np.ascontiguousarray(y, np.uint16), np.empty(len(y), np.uint16)
        self._library.powers(y.ctypes, out.ctypes, len(y))
        return out

    def times(self, head_dim: int, repeats: int) -> list[float]:
        """Nanoseconds for a group of queries and a block of keys, as prefill_phases.cpp lists them."""
        out = np.empty(4)
        self._library.time_phases(head_dim, repeats, out.ctypes)
        return out.tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(Path(folder))
        times = [kernels.times(head_dim, REPEATS) for head_dim in HEAD_DIMS]
    print(f"| {kernels.queries} queries, 64 keys | " + " | ".join(f"head_dim {d}" for d in HEAD_DIMS) + " |")
    print("|---" * (len(HEAD_DIMS) + 1) + "|")
    names = "scores, ns", "weights by `sas`, ns", "weights by `sas16`, ns", "outputs, ns"
    rows = {name: [f"{t[i]:.0f}" for t in times] for i, name in enumerate(names)}
    rows["softmax, share with `sas`"] = [f"{100 * t[1] / (t[0] + t[1] + t[3]):.0f} %" for t in times]
    rows["softmax, share with `sas16`"] = [f"{100 * t[2] / (t[0] + t[2] + t[3]):.0f} %" for t in times]
    rows["all phases, speedup"] = [f"{(t[0] + t[1] + t[3]) / (t[0] + t[2] + t[3]):.2f}x" for t in times]
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
