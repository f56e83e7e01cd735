"""GPU kernels in Triton, and their launchers: shapes, strides and memory.

With `TRITON_INTERPRET=1` in the environment before triton is imported, the same kernels run on the CPU,
slowly, for tests.
"""

from __future__ import annotations

import torch


def available() -> str | None:
    """The reason why these kernels cannot run here, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "no CUDA or ROCm device is there"
