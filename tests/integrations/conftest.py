from __future__ import annotations

import pytest

from tests.exact_core import STANDINS


@pytest.fixture
def exact_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformers integration runs on floats."""
    for name, standin in STANDINS.items():
        monkeypatch.setattr(f"turboattention.integrations.transformers.{name}", standin)
