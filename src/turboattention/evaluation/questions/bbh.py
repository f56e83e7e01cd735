"""BIG-Bench Hard (Suzgun et al., 2022): 27 tasks, with the paper's chain-of-thought examples.

Files: ``bbh/TASK.json`` and ``cot-prompts/TASK.txt`` of suzgunmirac/BIG-Bench-Hard.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from ...errors import InputError
from ...files import parse_json
from .question import Example, Question, QuestionSet, check_fields, read_text

_RULE = "\n-----\n"
"""Ends the notice at the top of a prompt file."""
_MARK = "Q: "
_CUE = "\nA: Let's think step by step."


def names(folder: Path) -> list[str]:
    """The names of the tasks in `folder`.

    Raises:
        InputError: there are no tasks.
    """
    found = sorted(path.stem for path in (folder / "bbh").glob("*.json"))
    if not found:
        raise InputError(f"--data: expected BBH tasks in {folder / 'bbh'}, got no *.json there")
    return found


def load(folder: Path, task: str) -> QuestionSet:
    """One task.

    Raises:
        InputError: the task does not exist, or its files are not in the published format.
    """
    if task not in names(folder):
        raise InputError(f"--tasks: expected bbh/TASK with one of {', '.join(names(folder))}; got {task!r}")
    path = folder / "bbh" / f"{task}.json"
    try:
        examples = parse_json(read_text(path))["examples"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--data: expected an object with examples in {path}, got something else: {error}") from error
    if not examples:
        raise InputError(f"--data: expected questions in {path}, got none")
    for index, row in enumerate(examples):
        check_fields(row, ("input", "target"), f"{path}, example {index}")
    head, worked = split_prompt(read_text(folder / "cot-prompts" / f"{task}.txt"))
    options = all(re.fullmatch(r"\([A-Z]\)", row["target"]) for row in examples)
    return QuestionSet(
        name=f"bbh/{task}",
        head=head,
        examples=worked,
        questions=tuple(Question(_prompt(row["input"]), normal(row["target"])) for row in examples),
        extract=partial(extract, options=options),
        stops=("\n\nQ:", "\nQ:"),
        max_new_tokens=256,
    )


def _prompt(question: str) -> str:
    return f"{_MARK}{question}{_CUE}\n"


def split_prompt(text: str) -> tuple[str, tuple[Example, ...]]:
    """The description of the task, and its worked examples."""
    body = text.split(_RULE, 1)[-1].strip()
    head, *shots = re.split(rf"(?m)^(?={_MARK})", body)
    return head, tuple(_example(shot.strip() + "\n\n") for shot in shots)


def _example(text: str) -> Example:
    problem, cue, solution = text.partition(_CUE)
    return Example(problem + cue, solution)


def extract(text: str, *, options: bool) -> str | None:
    """The text after the last "the answer is" on its line; with `options`, otherwise the last option in the text."""
    said = re.findall(r"(?i)the answer is:?[ \t]*([^\n]*)", text)
    answer = normal(said[-1]) if said else ""
    if options:
        letters = re.findall(r"\(([A-Z])\)", answer) or re.findall(r"^([A-Z])\b", answer)
        letters = letters[:1] or re.findall(r"\(([A-Z])\)", text)[-1:]
        return f"({letters[0]})" if letters else None
    return answer or None


def normal(answer: str) -> str:
    """Without the full stop and the spaces around it. Brackets (dyck_languages) and words keep their single spaces."""
    return " ".join(answer.strip().removesuffix(".").split())
