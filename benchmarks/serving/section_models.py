"""The section of docs/serving.md on real models."""

from __future__ import annotations

from typing import Any

from sections import MIB, machine, markdown


def real_models(document: dict[str, Any], name: str) -> str:
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
