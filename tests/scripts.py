"""Programs of benchmarks/ as modules: that folder is not a package."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextlib.contextmanager
def benchmark_script(path: str) -> Iterator[ModuleType]:
    """The module of a file in benchmarks/, as in "gpu/compiling.py"; imported under a name of its own, for dataclasses
    look their module up, until it is left."""
    spec = importlib.util.spec_from_file_location(f"benchmarks/{path}", BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
