"""The machine and software versions of a benchmark."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from .machine import cpu_name, package_version


def bench_facts(backend: str, **more: Any) -> dict[str, Any]:
    import torch

    from ..benchmarking import ggml, peak, remote

    cpuinfo = Path("/proc/cpuinfo")
    return {
        "turboattention": __version__,
        "commit": commit(),
        "backend": backend,
        "cpu": cpu_name(cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""),
        "isa": peak.instruction_set() if backend == "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "llama_cpp_python": package_version("llama-cpp-python"),
        "ggml": ggml.version(),
        "peers": remote.versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def commit() -> str | None:
    """The source tree's commit, with "+" where files differ from it; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    head, changes = (_git(root, *arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    return None if head is None else head + ("+" if changes else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
