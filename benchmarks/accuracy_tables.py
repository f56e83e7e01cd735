"""The generated parts of docs/accuracy.md and README.md. Documents come by label; see `accuracy.collect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accuracy_claims import MOST_KL, against, aims, lengths, real_aims
from accuracy_questions import questions

from turboattention.evaluation.report import summary

TITLES = {
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3": "Gemma 3 270M",
}
"""By label, in the order of the page."""
STAGES = {
    "wikitext2-2048": "WikiText-2",
    "book-2048": "A book",
    "wikitext2-8192": "WikiText-2, long contexts",
    "book-8192": "A book, long contexts",
    "wikitext2-2048-bos": "WikiText-2 behind a token that the tokenizer does not put there",
    "growth": "Text that the model writes itself",
}
FIRST = "wikitext2-2048"
SHOWN = (
    "turbo-8 turbo-4 turbo-4-lag turbo-4-reordered turbo-3-reordered turbo-2-reordered turbo-paper-4 "
    "int8 int4 kivi-4 kivi-2 gear-l-4 turboquant-4 saw-int4-kv q4_0-hadamard compander-4 oscar-2"
).split()
"""Methods of README's table."""
Document = dict[str, Any]


def page(documents: Mapping[str, Document]) -> str:
    """docs/accuracy.md: a chapter for each model."""
    return "\n\n".join(_chapter(label, document) for label, document in documents.items())


def _chapter(label: str, document: Document) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in document["facts"].items())
    picture = [f"![KL against bits per element](accuracy-{label}.png)"] if first(document) else []
    parts = [f"## {TITLES.get(label, 'The bundled model')}", *picture, facts]
    if "units" in document:  # one run, with tasks of its own
        parts += [markdown(*summary.table(document)), "### Its aims", markdown(*aims(document)), *_rivals(document)]
        return "\n\n".join([*parts, "### By context length", *(markdown(*table) for table in lengths(document))])
    for name, units in document["stages"].items():
        stage = {"units": units, "methods": methods(units)}
        if name in STAGES:
            parts += [f"### {STAGES[name]}", _what(units), markdown(*_text_table(stage, name))]
            if name == FIRST:
                parts += ["#### Its aims", markdown(*real_aims(label, stage))] if label in MOST_KL else []
                parts += _rivals(stage)
        elif name == "recall":
            parts += ["### Long recall", *(markdown(*table) for table in lengths(stage))]
        else:
            dtype = units[0].get("settings", {}).get("dtype")
            weights = [f"Weights in {dtype}."] if dtype else []
            parts += [f"### {name.upper()}", *weights, *(markdown(*table) for table in questions(stage))]
    return "\n\n".join(parts)


def first(document: Document) -> list[dict[str, Any]]:
    """The units that the picture and README's table are of; none where they are not measured yet."""
    return document["units"] if "units" in document else document["stages"].get(FIRST, [])


def _rivals(stage: Document) -> list[str]:
    without = "Without a lag, that is with the defaults:"
    return ["#### Against each baseline", markdown(*against(stage)), without, markdown(*against(stage, lag=False))]


def _what(units: Sequence[dict[str, Any]]) -> str:
    """One line on the text that was read."""
    task, tokens = units[0]["settings"], units[0]["tokens"]
    written = "; sampled by the model after 64 tokens of it" if "temperature" in task else ""
    behind = f", each passage behind `{task['begin']}`" if "begin" in task else ""
    size = f"passages of {task['context']:,}, pieces of {task['piece']}"
    return f"{tokens:,} tokens of {task['text']}{written}{behind}, {size}."


def _text_table(stage: Document, name: str) -> tuple[list[str], list[list[str]]]:
    columns, rows = summary.table(stage) if name != "growth" else _growth(stage)
    return columns, rows


def _growth(stage: Document) -> tuple[list[str], list[list[str]]]:
    """KL early and late in a text that the model wrote."""
    rows = []
    for unit in stage["units"]:
        metrics = unit["metrics"]
        first, last = metrics["kl_first"], metrics["kl_last"]
        grown = f"{last['value'] / first['value']:.1f}x" if first["value"] > 0 else summary.NOTHING
        cells = [summary.figure(metric, "{:.5f}", 1) for metric in (first, last)]
        shares = [summary.figure(metrics[key], "{:.2f}", 100) for key in ("overlap", "top1")]
        rows.append([unit["title"], summary.bits_text(unit["bits_per_element"]), *cells, grown, *shares])
    return ["method", "bits / element", "KL, first quarter", "KL, last quarter", "grown", "1 − TVD", "top-1"], rows


def readme(documents: Mapping[str, Document]) -> str:
    """README's table: what each method takes and loses on each real model's first text."""
    real = {label: first(document) for label, document in documents.items() if "stages" in document}
    found = {label: {unit["method"]: unit for unit in units} for label, units in real.items() if units}
    columns = ["method", *(f"{TITLES.get(label, label)}:<br>bits, KL, perplexity" for label in found)]
    names = [name for name in SHOWN if any(name in units for units in found.values())]
    rows = []
    for name in names:
        title = next(units[name]["title"] for units in found.values() if name in units)
        rows.append([title, *(_cell(units.get(name)) for units in found.values())])
    tokens = ", ".join(f"{next(iter(units.values()))['tokens']:,}" for units in found.values())
    note = (
        f"WikiText-2 in contexts of 2,048 tokens ({tokens} tokens), read through the cache in pieces of 64. Bits per\n"
        "element count scales, windows and everything else at that length; KL (in nats) and the change of perplexity\n"
        "are against the model's own cache. All methods, intervals, longer contexts and benchmarks:\n"
        "[docs/accuracy.md](docs/accuracy.md)."
    )
    return f"{markdown(columns, rows)}\n\n{note}"


def _cell(unit: dict[str, Any] | None) -> str:
    if unit is None:
        return summary.NOTHING
    metrics = unit["metrics"]
    kl, change = metrics["kl"]["value"], metrics["perplexity_change"]["value"]
    return f"{unit['bits_per_element']:.2f}, {kl:.4f}, {change:+.1%}"


def methods(units: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The methods of some units, each once, in their order."""
    return [{"name": name, "title": title} for name, title in dict.fromkeys((u["method"], u["title"]) for u in units)]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in line) + " |" for line in lines)
