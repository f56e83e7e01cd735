"""Questions with worked examples, and the extraction of answers from generated text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import files
from ...errors import InputError

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


@dataclass(frozen=True)
class Question:
    """`prompt` ends before the answer; `target` is the correct answer in the form of `QuestionSet.extract`."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Example:
    """A worked example: a prompt like that of a question, and the text that solves it."""

    prompt: str
    solution: str


@dataclass(frozen=True)
class QuestionSet:
    """A benchmark.

    Attributes:
        head: instructions before the examples, or "".
        examples: as many are used as fit the model's context.
        extract: the answer in a generated text, or None if there is none.
        stops: strings that end a generated text, because the model starts another question there.
        chat: prompts and solutions are rendered with a chat template.
    """

    name: str
    head: str
    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    extract: Callable[[str], str | None]
    stops: tuple[str, ...]
    max_new_tokens: int
    chat: bool = False

    def context(self, shots: int) -> str:
        """Everything before a question, with the first `shots` examples."""
        return self.head + "".join(example.prompt + example.solution for example in self.examples[:shots])

    def until_stop(self, generated: str) -> str:
        """The generated text before the first stop string."""
        ends = [generated.find(stop) for stop in self.stops if stop in generated]
        return generated[: min(ends)] if ends else generated


def plain_number(text: str) -> str | None:
    """ "$1,234.50" -> "1234.5", "18.00" -> "18"; None if it is not a number."""
    digits = text.replace(",", "").replace("$", "").rstrip(".")
    if not re.fullmatch(r"-?\d+(\.\d+)?", digits):
        return None
    whole, _, part = digits.partition(".")
    part = part.rstrip("0")
    sign = "-" if whole.startswith("-") else ""
    whole = whole.lstrip("-").lstrip("0") or "0"
    return f"{sign if whole != '0' or part else ''}{whole}{'.' + part if part else ''}"


def read_text(path: Path) -> str:
    """Raises InputError if the file cannot be read."""
    try:
        return files.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """JSON lines that have all of `fields`.

    Raises:
        InputError: the file or one of its lines has another format.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
        except ValueError as error:
            raise InputError(f"--data: expected JSON lines in {path}, got none in line {number}: {error}") from error
        check_fields(row, fields, f"{path}, line {number}")
        rows.append(row)
    if not rows:
        raise InputError(f"--data: expected questions in {path}, got an empty file")
    return rows


def check_fields(row: Any, fields: Sequence[str], where: str) -> None:
    """Raises InputError if a question is not an object or lacks a field."""
    got = sorted(row) if isinstance(row, dict) else type(row).__name__
    if not isinstance(row, dict) or not set(fields) <= set(row):
        raise InputError(f"--data: expected the fields {', '.join(fields)} in {where}, got {got}")
