"""Every promise here is held by PyTorch alone and by the C++ kernels."""

from __future__ import annotations

import pytest

from ..backends import take_backend


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" is: every promise holds on PyTorch alone and on the C++ kernels."""
    take_backend(request.param, monkeypatch)
    return request.param
