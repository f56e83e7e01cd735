"""docs/models.md from what a sweep found."""

from __future__ import annotations

import re
from collections import defaultdict

from .judge import Finding, Verdict

_INTRODUCTION = """# Models

Which causal language models of transformers {version} work with `attn_implementation="turbo"`. This page is written by
`make architectures`, which builds a tiny random model of each architecture ({seconds} s for all), runs prompts, single
tokens, several tokens at once and a padded batch in `generate`, and compares the logits with eager attention over the
model's own cache. Quantization is replaced by exact arithmetic there, so that nothing but rounding may differ: "works"
means a relative error below 1e-4. The last column is the error with 8 bits in the actual arithmetic; random models with
experts may route a token differently, which shows as a larger one.

Of {count} architectures and variants, {right} work, {refused} are refused with an error that names the reason, {wrong}
give wrong results, {foreign} fail otherwise, and {unbuilt} cannot be compared.

What a `TurboCache` does not support is refused when it is made, or else in the model's first forward pass. Models from
outside transformers meet the same checks: keys or values that a layer changes after the cache, a layer that reads what
the cache stores, new tokens that no attention function took, masks without the window of the cache, and masks that a
model computes with by itself all raise an error. Beyond these checks no forward pass is compared with exact attention.
That would cost a second attention over the whole prompt in every layer, and no bound tells quantization from a mistake:
it would refuse models with hard heads, which the [guard](numerics.md#the-guard) measures and reports.

Decoders with cross-attention (Bart, Marian and others) take
`EncoderDecoderCache(TurboCache(model.config), DynamicCache(config=model.config))`: the `TurboCache` holds the tokens,
and transformers' own cache what the encoder said.
"""


def page(verdicts: list[Verdict], version: str, seconds: float) -> str:
    by = defaultdict(list)
    for verdict in verdicts:
        by[of(verdict).verdict].append(verdict)
    counts = {"right": "right", "refused": "refused", "wrong": "wrong", "foreign": "foreign", "unbuilt": "not built"}
    text = _INTRODUCTION.format(
        version=version,
        seconds=round(seconds),
        count=len(verdicts),
        **{name: len(by[verdict]) or "none" for name, verdict in counts.items()},
    )
    parts = [text, _works(by["right"])]
    for title, verdict in (
        ("Wrong", "wrong"),
        ("Fail", "foreign"),
        ("Refused", "refused"),
        ("Not compared", "not built"),
    ):
        if by[verdict]:
            parts.append(f"## {title}\n\n" + _reasons({x.name: of(x) for x in by[verdict]}))
    wide = {x.name: x.found["default sizes"] for x in by["right"] if x.found["default sizes"].verdict != "right"}
    if wide:
        start = "## Work at tiny sizes, and are refused at those of their default config\n\n"
        parts.insert(2, start + _reasons(wide))
    for kind in ("DynamicCache", "StaticCache"):
        others = {x.name: x.found[kind] for x in verdicts if x.found and x.found[kind].verdict != "right"}
        if others:
            start = f'## "turbo" over a {kind}\n\nWithout a `TurboCache`. All compared architectures work but:\n\n'
            parts.append(start + _reasons(others))
    return "\n".join(parts)


def of(verdict: Verdict) -> Finding:
    """What the architecture is counted as."""
    return verdict.found["TurboCache"] if verdict.found else verdict.built


def _works(verdicts: list[Verdict]) -> str:
    rows = [
        f"| {x.name} | {x.found['TurboCache'].error or 0:.0e} | {x.found['INT8'].error or 0:.3f} |" for x in verdicts
    ]
    return "\n".join(["## Work\n", "| architecture | error, exact | error, 8 bits |", "|---|---|---|", *rows, ""])


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
    """The message, without what differs between architectures."""
    note = finding.note or f"relative error {finding.error:.1e}"
    note = re.sub(r"(architecture|kind) '[\w.-]+'", r"\1 NAME", note)
    return re.sub(r"\b(layer|layer's) \d+", r"\1 N", note).replace("|", r"\|")
