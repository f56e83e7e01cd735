"""A comparison as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..words import number_of
from .comparison import Comparison, Outcome, Row
from .output import bytes_text, number_text, share_text
from .stream import printable

MARK = "▶"
_NARROWEST = 34
"""Columns of text narrower than this are hard to read; each setting then gets a separate table."""


_FIGURES_WIDTH = 78
"""Narrower than this, the figures are rows and the caches columns."""

_FIGURES = (
    "\nKV size",
    "below\nFP16",
    "bits/\nelem.",
    "prompt\ns",
    "new\ntok/s",
    "first\ndiff.",
    "same\ntokens",
    "top-1\nagree",
)


def show(comparison: Comparison, prompt: str, facts: dict[str, Any], console: Console) -> None:
    """Texts side by side, then the figures."""
    console.print(facts_line(facts), style="dim", markup=False)
    ending = printable(" ".join(prompt[-300:].split()))
    line = Text(f"Prompt: {number_of(comparison.prompt_tokens, 'token')}, ending … ")
    width = max(console.width - len(line) - 1, 20)
    line.append(ending[-width:].lstrip(), style="italic")
    console.print(line, no_wrap=True, overflow="crop")
    groups = [comparison.rows] if _fits(comparison, console) else [[row] for row in comparison.rows]
    for rows in groups:
        console.print(_texts(comparison.own, rows))
    console.print(_figures(comparison, turned=console.width < _FIGURES_WIDTH))
    console.print(_legend(comparison), style="dim")


def facts_line(facts: dict[str, Any]) -> str:
    """A sentence that describes the run."""
    return (
        f"Model {facts['model']} in {facts['dtype']} on {facts['device']} (CPU threads: {facts['threads']}), "
        f"quantized attention on the {facts['backend']} backend."
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """One entry for the model's own cache, and a list with one for each setting."""
    return {
        "prompt_tokens": comparison.prompt_tokens,
        "own": outcome_json(comparison.own),
        "settings": [_row_json(row) for row in comparison.rows],
    }


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    figures = asdict(outcome)
    del figures["label"]
    return figures | {
        "new_tokens": len(outcome.tokens),
        "ratio": outcome.ratio,
        "bits_per_element": outcome.bits_per_element,
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "bits": row.setting.bits,
        "label": row.setting.label,
        "config": asdict(row.setting.config),
        **outcome_json(row.outcome),
        "first_difference": row.agreement.first_difference,
        "same_tokens": row.agreement.same_tokens,
        "top1_agreement": row.agreement.top1,
        "warnings": row.warnings,
    }


def _fits(comparison: Comparison, console: Console) -> bool:
    columns = len(comparison.rows) + 1
    return console.width // columns >= _NARROWEST


def _texts(own: Outcome, rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), pad_edge=False)
    table.add_column(own.label, ratio=1, overflow="fold")
    for row in rows:
        table.add_column(row.outcome.label, ratio=1, overflow="fold")
    # With several settings, there is no single position at which the model's own text differs.
    shared = rows[0].agreement.same_text_chars if len(rows) == 1 else None
    own_cell = marked(own, shared)
    table.add_row(own_cell, *(marked(row.outcome, row.agreement.same_text_chars) for row in rows))
    return table


def marked(outcome: Outcome, shared: int | None) -> Text:
    """The text, with a mark at the first difference from the other one."""
    end = " [end]" if outcome.ended else ""
    if shared is None or shared == len(outcome.text):
        return Text(printable(outcome.text).lstrip(" ")).append(end, style="dim")
    head, tail = printable(outcome.text[:shared]), printable(outcome.text[shared:])
    space = tail[: len(tail) - len(tail.lstrip(" "))]
    before = (head + space).lstrip(" ")
    return Text(before).append(MARK, style="bold red").append(tail[len(space) :], style="yellow").append(end, "dim")


def _figures(comparison: Comparison, *, turned: bool) -> Table:
    own = comparison.own
    lines = [(own.label, bytes_text(own.kv_bytes_fp16), "1.00x", "16.00", *_speed(own), "", "", "")]
    lines += [(row.outcome.label, *_row_figures(row)) for row in comparison.rows]
    header = ("\ncache", *_FIGURES)
    if turned:
        plain = [" ".join(name.split()).replace("/ ", "/") for name in header]
        header, *lines = zip(plain, *lines, strict=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=not turned, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _row_figures(row: Row) -> tuple[str, ...]:
    outcome, agreement = row.outcome, row.agreement
    first = agreement.first_difference
    return (
        bytes_text(outcome.kv_bytes),
        f"{outcome.ratio:.2f}x",
        f"{outcome.bits_per_element:.2f}",
        *_speed(outcome),
        "never" if first is None else f"at {first + 1}",
        share_text(agreement.same_tokens),
        share_text(agreement.top1),
    )


def _speed(outcome: Outcome) -> tuple[str, str]:
    return number_text(outcome.prefill_seconds, 2), number_text(outcome.decode_tokens_per_second)


def _legend(comparison: Comparison) -> str:
    tokens = len(comparison.own.tokens)
    differ = any(row.agreement.first_difference is not None for row in comparison.rows)
    lines = [f"{MARK} marks the first difference from the own cache's text."] if differ else []
    lines += [
        f"{number_of(tokens, 'new token')}, the likeliest each time. KV size: bytes allocated; own cache: its elements "
        "in FP16. first diff.: the first token that is not the own cache's. same tokens: equal at the same position, "
        "each cache going its own way. top-1 agree: fed the own cache's text token by token, the quantized cache "
        "also ranks its next token first.",
    ]
    for row in comparison.rows:
        lines += [f"{row.outcome.label}: {warning}" for warning in row.warnings]
    return "\n".join(lines)
