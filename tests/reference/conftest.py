"""Runs these tests on PyTorch and on the C++ kernels."""

from __future__ import annotations

import pytest

from ..backends import take_backend


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that "auto" selects: PyTorch, then the C++ kernels."""
    take_backend(request.param, monkeypatch)
    return request.param
