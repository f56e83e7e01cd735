"""One command measures a processor, into a file that carries its name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "this_processor", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return importlib.import_module("this_processor")


@pytest.mark.parametrize(
    ("cpu", "isa", "name"),
    [
        ("AMD EPYC 7B13 64-Core Processor", "avx2", "amd-epyc-7b13-64-core-avx2"),
        ("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", "amx", "intel-xeon-platinum-8480c-amx"),
        ("AMD EPYC", None, "amd-epyc"),
    ],
)
def test_names(script: ModuleType, cpu: str, isa: str | None, name: str) -> None:
    assert script.slug(cpu, isa) == name


def test_a_busy_machine_is_not_measured(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path / "cpu")
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(sys, "argv", ["x"])
    assert script.main() == 1
    assert "load: expected at most 0.25 threads of other work, got 1.50" in capsys.readouterr().out
    assert not (tmp_path / "cpu").exists()
    options = ["memory", "--lengths", "128", "--bits", "4", "--head-dim", "32", "--quick", "--backend", "reference"]
    monkeypatch.setattr(sys, "argv", ["x", "--anyway", "--", *options])
    assert script.main() == 0
    (path,) = (tmp_path / "cpu").glob("*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["facts"]["cpu"]
    assert [row["work"] for row in document["rows"]] == ["memory"] * 2
