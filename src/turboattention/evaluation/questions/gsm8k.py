"""GSM8K (Cobbe et al., 2021): grade-school word problems, solved in sentences that end in ``#### ANSWER``.

Files: ``test.jsonl`` and, for the worked examples, ``train.jsonl`` of openai/grade-school-math.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .question import NUMBER, Example, Question, QuestionSet, plain_number, read_lines

SHOTS = 5
FIELDS = ("question", "answer")


def load(folder: Path) -> QuestionSet:
    """The test split after the first `SHOTS` problems of the training split."""
    shots = read_lines(folder / "train.jsonl", FIELDS)[:SHOTS]
    questions = read_lines(folder / "test.jsonl", FIELDS)
    return QuestionSet(
        name="gsm8k",
        head="",
        examples=tuple(Example(_prompt(row), f" {row['answer']}\n\n") for row in shots),
        questions=tuple(Question(_prompt(row), extract(row["answer"]) or "") for row in questions),
        extract=extract,
        stops=("\n\nQuestion:", "Question:"),
        max_new_tokens=256,
    )


def _prompt(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def extract(text: str) -> str | None:
    """The number after the first ``####``; otherwise the last number in the text."""
    marked = re.search(rf"####\s*({NUMBER})", text)
    numbers = [marked.group(1)] if marked else re.findall(NUMBER, text)
    return plain_number(numbers[-1]) if numbers else None
