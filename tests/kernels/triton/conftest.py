"""The tests here run Triton's kernels on the CPU, by its interpreter; whether they do is decided where a kernel is
defined, so they are defined while the tests are collected. The rest of the tests do not see the setting."""

from __future__ import annotations

import os

import pytest

_NAME = "TRITON_INTERPRET"
_before = os.environ.get(_NAME)
os.environ[_NAME] = "1"


def pytest_collection_finish() -> None:
    if _before is None:
        del os.environ[_NAME]
    else:
        os.environ[_NAME] = _before


def pytest_itemcollected(item: pytest.Item) -> None:
    # Of the interpreter itself, in Triton 3.6.
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_NAME, "1")
