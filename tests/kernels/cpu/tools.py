"""Shared by tests of the C++ extension: the extension, or a skip with the reason."""

from __future__ import annotations

import pytest

pytest.importorskip("turboattention._cpu", reason="the C++ extension is not built", exc_type=ImportError)

from turboattention import _cpu

ISAS: list[str] = _cpu.isas()
every_isa = pytest.mark.parametrize("isa", ISAS)
