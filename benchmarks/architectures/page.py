"""docs/models.md from the results of a sweep."""

from __future__ import annotations

import json
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from .verdict import Finding, Verdict

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"

_INTRODUCTION = """# Models

The causal language models of transformers {version} that work with `attn_implementation="turbo"`. This page is written
by `make architectures` ({seconds} s of one core), which builds a tiny random model of each architecture and compares
two sets of logits with those of eager attention over the model's own cache:

- of two sequences of 53 tokens, in forward passes of 40, 1, 1, 9, 1 and 1 tokens;
- of 6 steps of greedy `generate` after a batch of prompts of 40 and 29 tokens, left-padded.

Quantization is replaced by exact arithmetic there, so that only rounding may differ: "works" means a relative error
below 1e-4 in both. Other decoding modes, real weights and sizes, and dtypes other than float32 are not compared here.
The last column is the error of the first set with 8 bits and actual quantization; it can be larger for random models
with experts, which may route a token differently.

Of {count} architectures and variants, {right} work with a `TurboCache`, {refused} are rejected with an error that
states the reason, {wrong} give other logits, {foreign} fail otherwise, and {unbuilt} cannot be compared.

An unsupported model is rejected when its `TurboCache` is created, or in its first forward passes. The same checks apply
to models from outside transformers. They raise an error if a layer changes keys or values after passing them to the
cache, if a layer reads the cache's content, if no attention function receives the new tokens, if a mask lacks the
window of the cache, or if a model uses the mask in its own computations. Apart from these checks, forward passes are
not compared with exact attention: that would cost a second attention over the whole prompt in every layer, and no bound
could distinguish quantization errors from mistakes. It would also reject models with heads that quantize badly, which
the [guard](numerics.md#the-guard) measures and reports.

For decoders with cross-attention (Bart, Marian and others), pass
`EncoderDecoderCache(TurboCache(model.config), DynamicCache(config=model.config))`: the `TurboCache` holds the decoder's
tokens, and transformers' own cache holds the encoder's keys and values.
"""

_IN_PART = """## Partly compared

Eager attention over the model's own cache raises an error in one set of logits. If it does in both, 12 forward passes
of one token were compared.

"""
_SPLIT = """## Different logits in transformers itself

In transformers, eager attention over the model's own cache gives different logits in several forward passes than in one
pass without a cache, for example because states are reset in a pass of several tokens. Here, "works" means that a
`TurboCache` gives the same logits as the model's own cache. Chunked prefill uses such passes.

| architecture | difference |
|---|---|"""


def stored() -> list[Verdict]:
    """The latest results."""
    return [Verdict.of(x) for x in _results()["architectures"]]


def of_results() -> str:
    """The page of the latest results."""
    return page(stored(), _results()["transformers"], _results()["seconds"])


def _results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def page(verdicts: list[Verdict], version: str, seconds: float) -> str:
    by = defaultdict(list)
    for verdict in verdicts:
        by[verdict.counted.verdict].append(verdict)
    counts = {"right": "right", "refused": "refused", "wrong": "wrong", "foreign": "foreign", "unbuilt": "not built"}
    text = _INTRODUCTION.format(
        version=version,
        seconds=round(seconds),
        count=len(verdicts),
        **{name: len(by[verdict]) or "none" for name, verdict in counts.items()},
    )
    parts = [text, _works(by["right"])]
    in_part = {x.name: x.built for x in verdicts if x.compared and x.built.note}
    if in_part:
        parts.append(_IN_PART + _reasons(in_part))
    split = [x for x in by["right"] if "at once" in x.found and x.found["at once"].verdict != "right"]
    if split:
        rows = [f"| {x.name} | {x.found['at once'].error:.0e} |" for x in split]
        parts.append("\n".join([_SPLIT, *rows, ""]))
    wide = {x.name: x.found["default sizes"] for x in by["right"] if x.found["default sizes"].verdict != "right"}
    if wide:
        start = "## Work at tiny sizes, rejected at the sizes of their default config\n\n"
        parts.append(start + _reasons(wide))
    for title, verdict in (
        ("Wrong", "wrong"),
        ("Fail", "foreign"),
        ("Rejected", "refused"),
        ("Not compared", "not built"),
    ):
        if by[verdict]:
            parts.append(f"## {title}\n\n" + _reasons({x.name: x.counted for x in by[verdict]}))
    compared = [x for x in verdicts if x.compared]
    parts += [_over(kind, {x.name: x.found[kind] for x in compared}) for kind in ("DynamicCache", "StaticCache")]
    return "\n".join(parts)


def _works(verdicts: list[Verdict]) -> str:
    rows = [
        f"| {x.name} | {x.found['TurboCache'].error or 0:.0e} | {x.found['INT8'].error or 0:.3f} |" for x in verdicts
    ]
    return "\n".join(["## Supported\n", "| architecture | error, exact | error, 8 bits |", "|---|---|---|", *rows, ""])


def _over(kind: str, found: dict[str, Finding]) -> str:
    """The section on "turbo" over one of transformers' caches."""
    others = {name: finding for name, finding in found.items() if finding.verdict != "right"}
    said = (
        f"The same two sets of logits over a `{kind}` instead of a `TurboCache`. Architectures that do not call "
        "transformers' attention interface use their own attention here. Of "
        f"{len(found)} architectures whose eager attention runs over its own cache, {len(found) - len(others)} give "
        "the logits of eager attention" + ("; the others:" if others else ".")
    )
    start = f'## "turbo" over a {kind}\n\n{textwrap.fill(said, 120)}\n'
    return start + ("\n" + _reasons(others) if others else "")


def _reasons(found: dict[str, Finding]) -> str:
    """A table of reasons, each with its architectures."""
    names = defaultdict(list)
    for name, finding in found.items():
        names[reason(finding)].append(name)
    rows = sorted(names.items(), key=lambda row: -len(row[1]))
    return "\n".join(
        ["| reason | architectures |", "|---|---|", *(f"| {why} | {', '.join(x)} |" for why, x in rows), ""]
    )


def reason(finding: Finding) -> str:
    """The message, without the parts that differ between architectures."""
    note = finding.note or f"relative error {finding.error:.1e}"
    note = re.sub(r"(architecture|kind) '[\w.-]+'", r"\1 NAME", note)
    note = re.sub(r"\d+ new tokens", "new tokens", note)
    return re.sub(r"\b(layer|layer's) \d+", r"\1 N", note).replace("|", r"\|")
