"""Features of the machine. Missing information is not an error."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__, bundled
from ..errors import TurboError
from .missing import missing

PACKAGES = ("torch", "numpy", "transformers", "triton", "safetensors")

# Instruction sets used by the kernels, by their flag in Linux.
_X86 = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
}
_ARM = {"neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "sve": "sve"}


@dataclass(frozen=True)
class Machine:
    """`features`: instruction sets and whether they are available, empty if unknown. Memory is in bytes."""

    turboattention: str
    python: str
    platform: str
    cpu: str
    cores: int
    threads: int
    features: dict[str, bool]
    memory: int | None
    memory_available: int | None
    gpus: list[str]
    packages: dict[str, str | None]
    backends: list[dict[str, Any]]
    model: str | None
    text: str | None
    missing: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Machine:
    import torch

    from ..api import backends

    return Machine(
        turboattention=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_name(_read("/proc/cpuinfo")),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        features=cpu_features(_read("/proc/cpuinfo"), platform.machine()),
        memory=_memory("MemTotal"),
        memory_available=_memory("MemAvailable"),
        gpus=_gpus(),
        packages={name: package_version(name) for name in PACKAGES},
        backends=[asdict(backend) for backend in backends().values()],
        model=_path(bundled.model_path),
        text=_path(bundled.text_path),
        missing=missing(),
    )


def cpu_name(cpuinfo: str) -> str:
    """The name of the processor from the text of /proc/cpuinfo, or from `platform`."""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine() or "not known"


def cpu_features(cpuinfo: str, machine: str) -> dict[str, bool]:
    """The instruction sets in the text of /proc/cpuinfo; empty if it has no flags."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if not found:
        return {}
    flags = set(found[1].split())
    wanted = _ARM if machine.lower() in ("aarch64", "arm64") else _X86
    return {name: flag in flags for name, flag in wanted.items()}


def _memory(name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if name == "MemTotal" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    kind = "ROCm" if torch.version.hip else "CUDA"
    number = torch.version.hip or torch.version.cuda
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, {d.total_memory / 2**30:.0f} GiB, {kind} {number}" for d in devices]


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _path(find: Callable[[], Path]) -> str | None:
    try:
        path = find()
    except TurboError:
        return None
    return str(path) if path.exists() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
