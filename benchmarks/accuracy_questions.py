"""Tables of benchmarks: proportions of correct answers, and comparisons of methods on the same questions."""

from __future__ import annotations

from typing import Any

from turboattention.evaluation.intervals import mcnemar, share
from turboattention.evaluation.report import summary

RIVALS = ("fp16", "turbo-4-reordered", "kivi-4", "kivi-2", "gear-l-4")
"""The method with which each method is compared."""
Table = tuple[list[str], list[list[str]]]


def questions(stage: dict[str, Any]) -> list[Table]:
    """Two tables of one benchmark; BBH's tasks count as one."""
    answers = {method["name"]: _answers(stage, method["name"]) for method in stage["methods"]}
    most = max(len(solved) for solved in answers.values())
    # A method interrupted before it had all questions has no row: proportions over other questions are not comparable.
    answers = {name: solved for name, solved in answers.items() if len(solved) == most}
    titles = {method["name"]: method["title"] for method in stage["methods"]}
    rivals = [name for name in RIVALS if name in answers]
    columns = ["method", "bits / element", f"correct, of {most}", *(f"against {titles[name]}" for name in rivals)]
    rows = []
    for name, solved in answers.items():
        sizes = [u["bits_per_element"] for u in stage["units"] if u["method"] == name]
        right = summary.figure(share(sum(solved), len(solved)), "{:.1f}", 100)
        cells = [summary.NOTHING if name == other else compared(solved, answers[other]) for other in rivals]
        rows.append([titles[name], summary.bits_text(sum(sizes) / len(sizes)), right, *cells])
    return [(columns, rows)]


def compared(solved: list[int], others: list[int]) -> str:
    """Questions that only the one and only the other answers, and McNemar's p."""
    found = mcnemar(solved, others)
    return f"+{found['one']} −{found['other']}, p = {found['p']:.2f}"


def _answers(stage: dict[str, Any], method: str) -> list[int]:
    units = sorted((u for u in stage["units"] if u["method"] == method), key=lambda unit: unit["task"])
    return [x for unit in units for x in unit["solved"]]
