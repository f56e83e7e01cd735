"""The softmax in 16-bit integers that the phases of a prefill are compared with."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
ALL = np.arange(1 << 15)


@pytest.fixture(scope="module")
def phases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prefill_phases", ROOT / "benchmarks" / "prefill_phases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("degree", "bound"), [(2, 2.2e-3), (3, 1.2e-4)])
def test_error_of_every_input(phases, degree, bound):
    found = phases.largest_error(phases.fit(degree))
    assert bound / 2 < found < bound
    weights = phases.power(ALL, phases.fit(degree))
    assert int(weights[0]) == 2**15 - 1
    assert bool((np.diff(weights) <= 2).all())  # falls, but for steps of an octave that do not meet to the last bit


@pytest.mark.skipif(
    shutil.which("c++") is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="needs a C++ compiler and AVX2",
)
def test_vectors_give_its_bits(phases, tmp_path):
    kernels = phases.Kernels(tmp_path)
    for degree in (2, 3):
        assert np.array_equal(kernels.powers(ALL, degree), phases.power(ALL, phases.fit(degree)))
    assert all(0 < t < 1e9 for t in kernels.times(64, 1))
