"""GSM8K, AQuA and BBH from local files in their published formats."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from . import aqua, bbh, gsm8k
from .conversation import Render, as_conversation
from .question import Example, Question, QuestionSet

__all__ = ["Example", "Question", "QuestionSet", "Render", "as_conversation", "is_question_set", "load"]


def is_question_set(name: str) -> bool:
    """Whether the name of a task is "gsm8k", "aqua", "bbh" or "bbh/TASK"."""
    return name in ("gsm8k", "aqua", "bbh") or name.startswith("bbh/")


def load(name: str, data: Path) -> list[QuestionSet]:
    """The question sets of a name, from the folders `gsm8k`, `aqua` and `bbh` in `data`; "bbh" is all of its tasks.

    Raises:
        InputError: a file is missing or not in the published format.
    """
    if name == "gsm8k":
        return [gsm8k.load(data / "gsm8k")]
    if name == "aqua":
        return [aqua.load(data / "aqua")]
    if name == "bbh":
        return [bbh.load(data / "bbh", task) for task in bbh.names(data / "bbh")]
    if name.startswith("bbh/"):
        return [bbh.load(data / "bbh", name.removeprefix("bbh/"))]
    raise InputError(f"--tasks: expected gsm8k, aqua, bbh or bbh/TASK, got {name!r}")
