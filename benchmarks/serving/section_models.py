"""The sections of docs/serving.md on real models."""

from __future__ import annotations

import json
from typing import Any

from sections import MIB, machine, markdown

TITLES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "gemma3": "Gemma 3 270M",
}
"""Of the folders' labels."""


def served(document: dict[str, Any], name: str) -> str:
    """Answers of models that people serve, beside those with vLLM's own attention."""
    columns = ["model", "same likeliest token", "perplexity", "its change", "chat", "tool call, and what is said of it"]
    rows = []
    for label, row in document["rows"].items():
        cells = [f"{row['agreement']:.1%} of {row['places']:,}", f"{row['perplexity']:.2f}"]
        cells += [f"{row['perplexity_change']:+.2%}", _both(row, "chat"), _both(row, "told", _call(row))]
        rows.append([TITLES.get(label, label), *cells])
    agreement, perplexity = document["bounds"]
    told = (
        "Each model behind vLLM's API server, at 4 bits and with vLLM's own attention, in float32. Likeliest tokens "
        "and perplexity are those of a text that is read as a prompt, from the 65th token on; the bounds of "
        f"`make vllm-models` are {agreement:.0%} and {perplexity:.0%}. Chats and tool calls are asked of models whose "
        "template has them, greedily."
    )
    return "\n\n".join(["## Real models", machine(document["facts"]), told, markdown(columns, rows)])


def _both(row: dict[str, Any], name: str, before: str = "") -> str:
    stock, ours = (row[who][name] for who in ("stock", "turbo"))
    if ours is None:
        return "no template"
    same = "both" if stock == ours else f"vLLM {_quoted(stock)}; 4 bits"
    return f"{before}{same} {_quoted(ours)}"


def _call(row: dict[str, Any]) -> str:
    call = row["turbo"]["call"]
    if call is None:
        return ""
    told = f"`{call['name']}({json.dumps(call['arguments'])})`"
    return f"both call {told}: " if call == row["stock"]["call"] else f"4 bits call {told}, vLLM another: "


def _quoted(text: str) -> str:
    """In one cell of a table."""
    return '"' + " ".join(text.replace("|", "\\|").split()) + '"'


def preemption(document: dict[str, Any], name: str) -> str:
    """Capacity, preemptions and quality of models that people serve; the time per token of one sequence."""
    columns = ["model, cache", "attention", "tokens", "times", "at once", "preemptions"]
    columns += ["KL, nats", "top-1", "perplexity change"]
    rows, base = [], 1
    for row in sorted(document["rows"], key=lambda row: (row["model"], row["budget"])):
        base = row["tokens"] if row["contender"] == "stock" else base
        cells = [f"{row['tokens']:,}", f"{row['tokens'] / base:.2f}", f"{row['tokens_a_step']:.1f}"]
        cells += [f"{row['num_preemptions']}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"]
        cells += [f"{row['perplexity_change']:+.2%}"]
        rows.append([f"{row['model']}, {row['budget'] / MIB:,.0f} MiB", row["title"], *cells])
    lengths = f"prompts of {document['prompt'][0]:,} to {document['prompt'][1]:,} tokens, {document['output'][0]} to "
    lengths += f"{document['output'][1]} generated"
    told = (
        f"{document['requests']} requests at once, {lengths}, under the same memory for each cache, TurboAttention's "
        f"side pool for up to {document['sequences']} sequences included. Tokens, requests *at once* (tokens per step, "
        "on average) and preemptions depend on blocks and lengths alone; they are counted with one layer that has the "
        "model's KV heads and one layer's share of the memory. Quality is that of the model itself in float32: "
        f"{document['tokens_read']} tokens of a text, read as a prompt over the served cache, compared with the same "
        "over an exact cache. vLLM's fp8 needs AVX-512 on CPUs, so its blocks are counted as 16-bit ones in twice the "
        "memory, and keys and values are rounded to e4m3 as they are stored."
    )
    parts = ["## Real models under a fixed cache", machine(document["facts"]), told, markdown(columns, rows)]
    return "\n\n".join([*parts, *map(low_load, document["low_load"])])


def low_load(found: dict[str, Any]) -> str:
    """A table of steps of one sequence."""
    columns = ["tokens in the cache", "time per token", "attention", "with vLLM's", "metadata", "with vLLM's"]
    rows = []
    for row in found["contexts"]:
        share = {part: f"{seconds / row['step']['stock']:.1%}" for part, seconds in row["parts"].items()}
        cells = [share[f"{who} {what}"] for what in ("attention", "metadata") for who in ("turbo", "stock")]
        rows.append([f"{row['context']:,}", f"{row['ratio']:.2f}", *cells])
    told = (
        f"Time per token of one sequence at 4 bits, {found['model']}, float32, as a ratio to vLLM's own attention: two "
        "engines in one process, whose steps alternate, medians, on a shared machine. The other columns are shares of "
        "a step with vLLM's own attention (attention includes storing)."
    )
    return f"{told}\n\n{markdown(columns, rows)}"
