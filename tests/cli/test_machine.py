from __future__ import annotations

import pytest

from turboattention import bundled
from turboattention.cli.machine import cpu_features, cpu_name
from turboattention.errors import InputError

X86 = "processor : 0\nmodel name\t: Some(R) CPU @ 2GHz\nflags\t\t: fpu avx avx2 avx_vnni avx512f amx_tile\n"
ARM = "processor : 0\nFeatures\t: fp asimd asimddp\n"


def test_x86() -> None:
    assert cpu_name(X86) == "Some(R) CPU @ 2GHz"
    assert cpu_features(X86, "x86_64") == {
        "avx2": True,
        "avx_vnni": True,
        "avx512f": True,
        "avx512_vnni": False,
        "amx_int8": False,
    }


def test_arm() -> None:
    assert cpu_features(ARM, "aarch64") == {"neon": True, "dotprod": True, "i8mm": False, "sve": False}


def test_systems_that_say_nothing() -> None:
    assert cpu_features("", "x86_64") == {}
    assert cpu_name("")


def test_bundled_text() -> None:
    text = bundled.text()
    assert text.startswith("I must have been asleep")
    assert text.endswith("the door opened, and")
    assert "\r" not in text
    assert bundled.text_path().is_file()


def test_bundled_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(bundled, "_HERE", tmp_path)
    with pytest.raises(InputError, match=r"model: expected the bundled model in .*, got none there"):
        bundled.model_path()
