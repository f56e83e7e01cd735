"""``--device``, ``--dtype`` and ``--threads``."""

from __future__ import annotations

import os
from enum import Enum

from ..errors import InputError

MAX_THREADS = 4 * (os.cpu_count() or 1)
"""Upper limit of `--threads`. More threads are slower, and too many make the process fail."""


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def choose(device: str, dtype: Dtype) -> tuple[str, str]:
    """An available device and a dtype for it: float32 on a CPU, the model's own elsewhere.

    Raises:
        InputError: the device is not available.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device: expected a device of this machine such as cpu, got {device!r}") from error
    if dtype is Dtype.auto and torch.device(device).type == "cpu":
        return device, "float32"
    return device, dtype.value


def use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
