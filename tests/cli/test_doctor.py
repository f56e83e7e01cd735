from __future__ import annotations

from dataclasses import replace

import pytest

import turboattention as ta
from turboattention.cli import doctor
from turboattention.cli.machine import examine


def test_json(run) -> None:
    data = run("doctor", "--json").json
    assert data["turboattention"] == ta.__version__
    assert {backend["name"]: backend["usable"] for backend in data["backends"]} == {
        name: backend.usable for name, backend in ta.backends().items()
    }
    assert all(backend["reason"] for backend in data["backends"])
    assert data["packages"]["torch"]
    assert data["threads"] >= 1
    assert data["cores"] >= 1
    assert data["text"].endswith("text.txt")


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_table(run, columns: int) -> None:
    ran = run("doctor", columns=columns)
    assert (ran.code, ran.stderr) == (0, "")
    assert max(len(line) for line in ran.stdout.splitlines()) <= columns
    for word in ("CPU", "memory", "GPU", "torch", "triton", "reference", "works", "yes"):
        assert word in ran.stdout


def test_a_bare_machine(run, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(
        examine(), features={}, memory=None, memory_available=None, gpus=[], model=None, text=None, missing=["rich"]
    )
    monkeypatch.setattr(doctor, "examine", lambda: bare)
    shown = " ".join(run("doctor").stdout.split())
    assert shown.count("unknown on this system") == 2
    assert "none that torch can use" in shown
    assert "the bundled model is not here" in shown
    assert 'Not installed: rich. For everything: pip install ".[all]" in a clone of the repository' in shown


def test_a_rich_machine(run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(
        examine(),
        features={"avx2": True, "amx_int8": False},
        gpus=["Some GPU, 80 GiB, CUDA 13.0", "Another"],
        memory=64 << 30,
        memory_available=8 << 30,
    )
    monkeypatch.setattr(doctor, "examine", lambda: found)
    shown = " ".join(run("doctor", columns=140).stdout.split())
    assert "avx2 (not: amx_int8)" in shown
    assert "Some GPU, 80 GiB, CUDA 13.0; Another" in shown
    assert "64.0 GiB, 8.00 GiB available" in shown
