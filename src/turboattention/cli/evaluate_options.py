"""The options of ``turboattention eval`` that have to be checked, or made into something, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .missing import INSTALL

if TYPE_CHECKING:
    from ..evaluation.baselines import CacheMethod


def check_methods(methods: list[CacheMethod]) -> None:
    """Raises InputError for a method that cannot run here."""
    for method in methods:
        why = method.unavailable()
        if why is not None:
            raise InputError(f"--methods: {method.name} cannot run here: {why}")


def check_plots() -> None:
    """Raises InputError where the report's figures could not be drawn after a long run."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError(f"--out: the report's figures need the package matplotlib: {INSTALL}")


def check_outside(names: list[str], include: Path | None) -> None:
    """Raises InputError for a task that lm-evaluation-harness does not have, or where it is not installed."""
    from ..evaluation.suite import OUTSIDE

    outside = [name.removeprefix(OUTSIDE) for name in names if name.startswith(OUTSIDE)]
    if include is not None and not include.is_dir():
        raise InputError(f"--include: expected a folder with task files, got {include}")
    if outside:
        from ..integrations.transformers import harness

        for name in outside:
            harness.check(name, include)


def outside(name: str, limit: int | None, data: Path | None, include: Path | None) -> Any:
    """A task of lm-evaluation-harness."""
    from ..integrations.transformers.harness import HarnessTask

    return HarnessTask(name, limit, data, include)


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """ "1024,512" -> (512, 1024)."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--lengths: expected numbers above 0 such as 1024,4096, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))
