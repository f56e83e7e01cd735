from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from turboattention.benchmarking import peak

EXTENSION = "turboattention._cpu"


def test_floats() -> None:
    assert peak.float_peak(64, 1) > 0


def test_integers_by_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"fast": 200, "slow": 20}
    native = SimpleNamespace(isas=lambda: list(rates), isa=lambda: "fast", peak_gops=rates.get)
    monkeypatch.setitem(sys.modules, EXTENSION, native)
    assert peak.integer_peak() == {"fast": 200.0, "slow": 20.0}
    assert peak.instruction_set() == "fast"


def test_an_extension_that_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, SimpleNamespace(isas=lambda: ["fast"], isa=lambda: "fast"))
    assert peak.integer_peak() == {}


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, None)
    assert peak.integer_peak() == {}
    assert peak.instruction_set() is None
