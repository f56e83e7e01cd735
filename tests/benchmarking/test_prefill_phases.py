"""The phases of a prefill, timed on the kernels' own code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from turboattention.softmax import sas16_power

from ..scripts import benchmark_script


@pytest.fixture(scope="module")
def phases() -> Iterator[ModuleType]:
    with benchmark_script("prefill_phases.py") as module:
        yield module


@pytest.mark.skipif(
    shutil.which("c++") is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="needs a C++ compiler and AVX2",
)
def test_vectors_give_the_bits_of_every_power(phases, tmp_path):
    kernels, every = phases.Kernels(tmp_path), np.arange(1 << 16)
    assert np.array_equal(kernels.powers(every), sas16_power(torch.from_numpy(every).int()).numpy())
    assert all(0 < t < 1e9 for t in kernels.times(64, 1))
