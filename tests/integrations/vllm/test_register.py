"""The entry point: inert without the variable, the same once or twice with it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "src"


def cold(statements: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{statements}"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    return run.stdout.strip()


@pytest.mark.parametrize("value", ["", "0"])
def test_inert_without_the_variable(value: str) -> None:
    shown = cold(
        "from turboattention.integrations.vllm import register; register()\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'vllm'])",
        TURBOATTENTION_VLLM=value,
    )
    assert shown == "[]"


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_registers_once_or_twice() -> None:
    shown = cold(
        "from turboattention.integrations.vllm import register; register(); register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as names\n"
        "print([names[name].get_class().__name__ for name in ('CPU_ATTN', 'CUSTOM', 'CPU_MLA', 'AMX_MLA')])",
        TURBOATTENTION_VLLM="1",
    )
    assert shown.endswith("['TurboBackend', 'TurboBackend', 'RefusedMLA', 'RefusedMLA']")


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_finds_it() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="turboattention")
    assert found.value == "turboattention.integrations.vllm:register"
