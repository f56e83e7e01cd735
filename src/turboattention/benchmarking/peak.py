"""The limits of the processor, measured together with the kernels."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch


def peaks() -> dict[str, float]:
    """All limits by name, with the unit in the name."""
    integer = {f"{name} INT8 GOPS": rate for name, rate in integer_peak().items()}
    return {"float32 GFLOPS": float_peak(), "read GB/s": read_bandwidth()} | integer


def float_peak(size: int = 1024, rounds: int = 5) -> float:
    """GFLOPS of a float32 matrix product in torch, best of several rounds."""
    a = torch.randn(size, size)
    best = float("inf")
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e9


def read_bandwidth(megabytes: int = 512, rounds: int = 5) -> float:
    """GB/s of summing floats from main memory in torch, best of several rounds."""
    x = torch.ones(megabytes * 1_000_000 // 4)
    best = float("inf")
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - begun)
    return x.nbytes / best / 1e9


def integer_peak() -> dict[str, float]:
    """GOPS of the INT8 dot product by instruction set, from the CPU extension; empty without it."""
    native = _extension()
    if native is None or not hasattr(native, "peak_gops"):
        return {}
    return {name: float(native.peak_gops(name, torch.get_num_threads())) for name in native.isas()}


def instruction_set() -> str | None:
    """The instruction set that the CPU extension uses; None without the extension."""
    native = _extension()
    return None if native is None else native.isa()


def _extension() -> Any:
    try:
        return importlib.import_module("turboattention._cpu")
    except ImportError:
        return None
