"""The table of backends: which are usable, which is chosen, and why."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import turboattention as ta
from turboattention import dispatch
from turboattention.dispatch import Availability
from turboattention.errors import BackendError, InputError


def test_a_cache_finds_its_quantizer_whatever_was_imported():
    """The module of the cache alone, without any of those above it."""
    code = """
import sys, torch
from turboattention.kv.cache import KVCache
assert "turboattention.dispatch" not in sys.modules
from turboattention.kv.quantizer import quantizer_for
print(getattr(quantizer_for(torch.device("cpu")), "__name__", "PyTorch"))
KVCache(1, 2, 8).append(*torch.ones(2, 1, 2, 3, 8))
"""
    environment = {"PYTHONPATH": str(Path(ta.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    wanted = "turboattention.impl.cpu.quantizer" if ta.backends()["cpu"].usable else "PyTorch"
    assert run.stdout == f"{wanted}\n", run.stderr


def test_every_backend_is_listed_with_a_reason():
    found = ta.backends()
    assert set(found) == {"reference", "cpu", "triton"}
    for name, backend in found.items():
        assert backend.name == name
        assert isinstance(backend.usable, bool)
        assert backend.reason
    assert found["reference"].usable


def test_the_list_cannot_be_changed_from_outside():
    ta.backends().clear()
    assert "reference" in ta.backends()
    with pytest.raises(dataclasses.FrozenInstanceError):
        ta.backends()["reference"].usable = False


def set_backends(monkeypatch, **usable: bool) -> None:
    for name, ok in usable.items():
        state = Availability(name, ok, f"reason of {name}")
        monkeypatch.setattr(type(dispatch.TABLE[name]), "availability", lambda self, state=state: state)


@pytest.mark.parametrize(
    "usable, chosen",
    [
        ({"triton": True, "cpu": True, "reference": True}, "triton"),
        ({"triton": False, "cpu": True, "reference": True}, "cpu"),
        ({"triton": False, "cpu": False, "reference": True}, "reference"),
    ],
)
def test_auto_takes_the_first_that_is_usable(usable, chosen, monkeypatch):
    set_backends(monkeypatch, **usable)
    assert dispatch.choose("auto").name == chosen


def test_a_backend_named_explicitly_never_falls_back(monkeypatch):
    set_backends(monkeypatch, triton=False, cpu=True, reference=True)
    assert dispatch.choose("cpu").name == "cpu"
    assert dispatch.choose("reference").name == "reference"
    with pytest.raises(
        BackendError, match=r"^backend: expected one that can run here, got 'triton' \(reason of triton\)$"
    ):
        dispatch.choose("triton")


def test_only_the_named_backend_is_asked(monkeypatch):
    def asked(self):
        raise AssertionError("asked")

    for name in ("triton", "cpu"):
        monkeypatch.setattr(type(dispatch.TABLE[name]), "availability", asked)
    assert dispatch.choose("reference").name == "reference"


def test_unknown_names():
    with pytest.raises(InputError, match=r"^backend: expected \"auto\" or one of cpu, reference, triton, got 'cuda'$"):
        dispatch.choose("cuda")


def test_explanations_say_which_and_why(monkeypatch):
    set_backends(monkeypatch, triton=False, cpu=True, reference=True)
    explained = dispatch.explain_choice("auto")
    assert (explained.backend, explained.reason) == ("cpu", "reason of cpu")
    assert explained.others == {"triton": "reason of triton"}
    assert str(explained).splitlines() == ["cpu: reason of cpu", "not triton: reason of triton"]
    assert dispatch.explain_choice("reference").backend == "reference"
    with pytest.raises(BackendError):
        dispatch.explain_choice("triton")
