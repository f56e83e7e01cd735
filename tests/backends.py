"""Runs the same tests on PyTorch and on the C++ kernels."""

from __future__ import annotations

import pytest

from turboattention import dispatch


def take_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make "auto" the named backend for calls that it supports. Skips if it is not built."""
    if name == "cpu":
        if not dispatch.backends()["cpu"].usable:
            pytest.skip(dispatch.backends()["cpu"].reason)
        return
    monkeypatch.setattr(dispatch, "TABLE", {"reference": dispatch.TABLE["reference"]})
