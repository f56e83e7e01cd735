"""The program of `make test-arm`, which needs an emulator, is at least one that compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_program_compiles() -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    options = "-std=c++17 -fsyntax-only -Wall -Werror -Icsrc/cpu tests/kernels/cpu/checksums.cpp".split()
    ran = subprocess.run([compiler, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
