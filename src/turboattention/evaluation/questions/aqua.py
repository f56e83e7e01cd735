"""AQuA (Ling et al., 2017): algebra word problems with five options and a rationale.

Files: ``test.json`` and, for the worked examples, ``dev.json`` of google-deepmind/AQuA, one JSON object per line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .question import Example, Question, QuestionSet, read_lines

SHOTS = 5
FIELDS = ("question", "options", "rationale", "correct")


def load(folder: Path) -> QuestionSet:
    """The test split after the first `SHOTS` problems of the development split."""
    shots = read_lines(folder / "dev.json", FIELDS)[:SHOTS]
    questions = read_lines(folder / "test.json", FIELDS)
    return QuestionSet(
        name="aqua",
        head="",
        examples=tuple(
            Example(_prompt(row), f" {row['rationale'].strip()}\nThe answer is {row['correct']}.\n\n") for row in shots
        ),
        questions=tuple(Question(_prompt(row), row["correct"]) for row in questions),
        extract=extract,
        stops=("\n\nQuestion:", "Question:"),
        max_new_tokens=256,
    )


def _prompt(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nOptions: {' '.join(row['options'])}\nAnswer:"


def extract(text: str) -> str | None:
    """The option after the last "answer is" (or "answer -", "answer:"); otherwise the last single option letter."""
    named = re.findall(r"(?i:answer)\s*(?i:is|[-:–])*\s*\(?([A-E])\b", text)
    alone = named or re.findall(r"(?<![A-Za-z])\(?([A-E])\)(?![A-Za-z])", text)
    return alone[-1] if alone else None
