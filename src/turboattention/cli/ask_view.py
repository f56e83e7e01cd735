"""Answers over several caches, as text and a table, and as JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..words import number_of
from .asking import Answers, Prompted
from .comparison import Agreement, Outcome
from .comparison_view import MARK, facts_line, marked, outcome_json
from .output import bytes_text, number_text, share_text


class Live:
    """Prints every answer as it comes, cache by cache, and the table at the end."""

    def __init__(self, console: Console, facts: dict[str, Any], document_tokens: int):
        self._console = console
        console.print(facts_line(facts), style="dim", markup=False)
        console.print(f"Document: {number_of(document_tokens, 'token')}, read once for each cache.", markup=False)

    def document(self, label: str, seconds: float) -> None:
        self._console.print()
        self._console.print(
            Text(label, style="bold").append(f", document read in {seconds:.2f} s", style="not bold dim")
        )

    def answer(self, question: str, outcome: Outcome, agreement: Agreement | None) -> None:
        self._console.print(Text(question, style="dim"))
        self._console.print(Padding(_answer(outcome, agreement), (0, 0, 0, 2)))

    def end(self, answers: Answers) -> None:
        console = self._console
        console.print()
        wide = _figures(answers, turned=False)
        fits = console.measure(wide, options=console.options.update(max_width=1000)).maximum <= console.width
        console.print(wide if fits else _figures(answers, turned=True))
        console.print(_legend(answers), style="dim", markup=False)


def _answer(outcome: Outcome, agreement: Agreement | None) -> Text:
    if agreement is not None and agreement.first_difference is None:
        return Text("the same, token for token", style="green")
    return marked(outcome, None if agreement is None else agreement.same_text_chars)


def _figures(answers: Answers, *, turned: bool) -> Table:
    """turned: figures are rows and caches columns, for a narrow terminal."""
    header: tuple[str, ...] = (
        "\ncache",
        "\nKV size",
        "below\nFP16",
        "read\ns",
        "\nfile",
        "load\ns",
        "new\ntok/s",
        "first\ndiff.",
        "same\ntokens",
        "top-1\nagree",
    )
    lines = [_row(cache) for cache in answers.caches]
    if turned:
        header, *lines = zip([" ".join(name.split()) for name in header], *lines, strict=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=not turned, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _row(cache: Prompted) -> tuple[str, ...]:
    if cache.setting is None:  # counted at 2 bytes per element, independent of the dtype
        size = bytes_text(cache.kv_bytes_fp16), "1.00x"
        return cache.label, *size, *_times(cache), "", "", ""
    firsts = [x.first_difference for x in cache.agreements]
    first = "/".join("–" if x is None else str(x + 1) for x in firsts)
    return (
        cache.label,
        bytes_text(cache.kv_bytes),
        f"{cache.ratio:.2f}x",
        *_times(cache),
        first,
        share_text(cache.same_tokens),
        share_text(cache.top1),
    )


def _times(cache: Prompted) -> tuple[str, str, str, str]:
    return (
        number_text(cache.read_seconds, 2),
        "–" if cache.file_bytes is None else bytes_text(cache.file_bytes),
        number_text(cache.load_seconds, 2),
        number_text(cache.tokens_per_second),
    )


def _legend(answers: Answers) -> str:
    tokens = sum(len(x.tokens) for x in answers.caches[0].outcomes)
    lines = [
        f"{number_of(tokens, 'token')} of answers, the likeliest each time. KV size: bytes allocated for the document; "
        "own cache: its elements in FP16. Questions start from the file. first diff.: for each question the first "
        f"token that is not the own cache's, {MARK} in the answer (–: none). same tokens: equal at the same position. "
        "top-1 agree: fed the own cache's answer token by token, the quantized cache also ranks its next token first."
    ]
    lines += [f"{cache.label}: {warning}" for cache in answers.caches for warning in cache.warnings]
    return "\n".join(lines)


def answers_json(answers: Answers) -> dict[str, Any]:
    """One entry per cache, starting with the model's own, each with one entry per question."""
    return {
        "document_tokens": answers.document_tokens,
        "questions": answers.questions,
        "caches": [_cache_json(cache) for cache in answers.caches],
    }


def _cache_json(cache: Prompted) -> dict[str, Any]:
    entries = [outcome_json(outcome) for outcome in cache.outcomes]
    for entry, agreement in zip(entries, cache.agreements, strict=False):
        entry |= {
            "first_difference": agreement.first_difference,
            "same_tokens": agreement.same_tokens,
            "top1_agreement": agreement.top1,
        }
    return {
        "label": cache.label,
        "bits": None if cache.setting is None else cache.setting.bits,
        "read_seconds": cache.read_seconds,
        "kv_bytes": cache.kv_bytes,
        "kv_bytes_fp16": cache.kv_bytes_fp16,
        "ratio": cache.ratio,
        "file_bytes": cache.file_bytes,
        "load_seconds": cache.load_seconds,
        "decode_tokens_per_second": cache.tokens_per_second,
        "answers": entries,
        "warnings": cache.warnings,
    }
