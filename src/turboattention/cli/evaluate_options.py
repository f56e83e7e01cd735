"""Options of ``turboattention eval`` that are checked or converted before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..evaluation.baselines import CacheMethod


def check_methods(methods: list[CacheMethod]) -> None:
    """Raises InputError for a method that cannot run here."""
    for method in methods:
        why = method.unavailable()
        if why is not None:
            raise InputError(f"--methods: {method.name} cannot run here: {why}")


def check_chat(chat: bool, names: list[str]) -> None:
    """Raises InputError for a chat template without a task that asks questions from files."""
    from ..evaluation.questions import is_question_set

    if chat and not any(is_question_set(name) for name in names):
        raise InputError(f"--chat: expected gsm8k, aqua or bbh among --tasks, got {', '.join(names)}")


def check_outside(names: list[str], include: Path | None) -> None:
    """Raises InputError for a task that lm-evaluation-harness does not have, or if it is not installed."""
    from ..evaluation.suite import OUTSIDE

    outside = [name.removeprefix(OUTSIDE) for name in names if name.startswith(OUTSIDE)]
    if include is not None and not include.is_dir():
        raise InputError(f"--include: expected a folder with task files, got {include}")
    if outside:
        from ..evaluation.hf import harness

        for name in outside:
            harness.check(name, include)


def outside(name: str, limit: int | None, data: Path | None, include: Path | None) -> Any:
    """A task of lm-evaluation-harness."""
    from ..evaluation.hf.harness import HarnessTask

    return HarnessTask(name, limit, data, include)
