"""Launchers of the C++ extension `turboattention._cpu`: shapes, strides and memory for its kernels."""

from __future__ import annotations

import importlib

_cpu = importlib.import_module("turboattention._cpu")


def in_use() -> str:
    """The instruction set of the kernels: the best that was compiled and the processor has, or the
    one that the environment variable TURBOATTENTION_ISA names (ValueError if it is not available)."""
    return _cpu.isa()


def available() -> list[str]:
    """Instruction sets compiled in that the processor supports, the best first."""
    return _cpu.isas()
