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
        "print([names[name].get_class().__name__ for name in ('CPU_ATTN', 'CUSTOM', 'CPU_MLA', 'AMX_MLA', "
        "'FLASH_ATTN_DIFFKV', 'TRITON_ATTN_DIFFKV')])",
        TURBOATTENTION_VLLM="1",
    )
    assert shown.endswith(str(["TurboBackend"] * 2 + ["RefusedMLA"] * 2 + ["RefusedDiffKV"] * 2))


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_finds_it() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="turboattention")
    assert found.value == "turboattention.integrations.vllm:register"


def with_vllm(folder: Path, version: str, registry: str, backend: str) -> str:
    """Registers with a vLLM that has a registry module and the plugin's backend module as given; what it says."""
    package = folder / "vllm" / "v1" / "attention" / "backends"
    models = folder / "vllm" / "model_executor" / "models"
    for each in (package, models):
        each.mkdir(parents=True)
    (models / "config.py").write_text("MODELS_CONFIG_MAP = {}\nclass VerifyAndUpdateConfig: pass\n", encoding="utf-8")
    (folder / "vllm" / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
    (package / "registry.py").write_text(registry, encoding="utf-8")
    statements = f"""
import logging, types
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
sys.path.insert(0, {str(folder)!r})
from turboattention.integrations import vllm
{backend}
try:
    vllm.register()
except Exception as error:
    print(type(error).__name__, error)
"""
    return cold(statements, TURBOATTENTION_VLLM="4")


REGISTRY = """
class AttentionBackendEnum:
    def __class_getitem__(cls, name): return name
def register_backend(name, where): pass
"""


def test_the_tested_release_is_registered_silently(tmp_path: Path) -> None:
    assert with_vllm(tmp_path, "0.32.1+cpu", REGISTRY, "") == ""


def test_another_release_is_named(tmp_path: Path) -> None:
    fitting = "sys.modules[vllm.__name__ + '.backend'] = types.ModuleType('backend')"
    said = with_vllm(tmp_path, "0.41.0", REGISTRY, fitting)
    assert said == "WARNING turboattention is tested with vLLM 0.32, this is 0.41.0: check its answers before " \
        "relying on them"  # fmt: skip


def test_another_release_without_an_interface_is_refused_in_one_line(tmp_path: Path) -> None:
    said = with_vllm(tmp_path, "0.41.0", REGISTRY, "")
    assert said.startswith("BackendError vllm: expected release 0.32, got 0.41.0 (")
    assert "vllm.config" in said
    assert "\n" not in said
