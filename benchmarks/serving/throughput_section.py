"""The measured sections of docs/serving.md on throughput and latency."""

from __future__ import annotations

import statistics
from typing import Any

from contenders import FP8
from sections import MIB, machine, markdown

Rows = list[dict[str, Any]]


def throughput(document: dict[str, Any], name: str) -> str:
    """For real models, `document["quality"]` has the results of `quality.py`."""
    plan, quality = document["plan"], document.get("quality")
    lengths = f"prompts of {plan['prompt'][0]:,} to {plan['prompt'][1]:,} tokens, {plan['output'][0]} to "
    lengths += f"{plan['output'][1]} generated"
    return "\n\n".join(
        [
            f"## Throughput under a fixed cache, {document['model']}",
            machine(document["facts"]),
            f"{plan['requests']} requests, {lengths}, bfloat16, medians over "
            f"{document['rounds']} round{'s' * (document['rounds'] != 1)}, in which the "
            "caches alternate, each in a separate engine. The cache size is the total memory for keys and values, "
            f"including TurboAttention's tail slots for up to {plan['sequences']} sequences. *Tokens per step*: "
            "the average number. *Speedup*: the time of all requests in the first row divided by that in this row; "
            "with staggered arrivals, the arrival rate is the limit." + (_quality(quality) if quality else ""),
            table(document),
            _latency(document) + _without_fp8(document),
            f"![throughput and latency, all at once]({name}.png)",
        ]
    )


def table(document: dict[str, Any]) -> str:
    """A row per scenario and contender, medians over the rounds."""
    quality = document.get("quality")
    percentiles = [at for at in ("p50", "p95", "p99") if at in document["rows"][0]["per_token"]]
    columns = ["cache, requests", "attention", "tokens of cache", "output tokens/s", "speedup", "tokens per step"]
    spread = ", ".join(percentiles)
    columns += ["preemptions", f"time to first token, s ({spread})", f"time per token after it, ms (mean, {spread})"]
    columns += ["KL", "top-1", "perplexity"] if quality else []
    rows = []
    for found in scenarios(document).values():
        base = next(iter(found.values()))
        for mine in found.values():
            times = middle(base, "seconds") / middle(mine, "seconds")
            what = f"{mine[0]['budget'] / MIB:,.0f} MiB, {load_of(mine[0])}"
            cells = [f"{mine[0]['tokens']:,}", f"{middle(mine, 'output_tokens_per_second'):.0f}", f"{times:.2f}"]
            cells += [f"{middle(mine, 'tokens_a_step'):.1f}", f"{middle(mine, 'num_preemptions'):.0f}"]
            cells += [", ".join(f"{middle(mine, 'first_token', at):.2f}" for at in percentiles)]
            cells += [", ".join(f"{middle(mine, 'per_token', at) * 1e3:.1f}" for at in ("mean", *percentiles))]
            cells += _quality_cells(quality["contenders"].get(mine[0]["contender"])) if quality else []
            rows.append([what, mine[0]["title"], *cells])
    return markdown(columns, rows)


def _quality(document: dict[str, Any]) -> str:
    return (
        " *KL* (nats), *top-1* (the share of tokens ranked first by both) and *perplexity* (its relative change) "
        f"compare the next token with that of the first row, over {document['passages']} passages of "
        f"{document['context']:,} tokens that are read in steps of {document['step']}; *calibrated*: with an order of "
        "K's channels, and for Qwen also means of K, measured on another text."
    )


def _quality_cells(figures: dict[str, float] | None) -> list[str]:
    if figures is None:
        return ["–"] * 3
    return [f"{figures['kl']:.4f}", f"{figures['top1']:.1%}", f"{figures['perplexity']:+.1%}"]


def load_of(row: dict[str, Any]) -> str:
    """How the requests of a row arrived."""
    if row.get("alone"):
        return "one at a time"
    return "all at once" if row["rate"] is None else f"{row['rate']:g} per second"


def _latency(document: dict[str, Any]) -> str:
    """A sentence on the time per token at low load and with all requests at once."""
    slower: dict[str, list[float]] = {}
    for found in scenarios(document).values():
        base, *others = found.values()
        others = [mine for mine in others if mine[0]["contender"].startswith("turbo")]
        if others:
            slower.setdefault(load_of(base[0]), []).extend(
                middle(mine, "per_token", "mean") / middle(base, "per_token", "mean") for mine in others
            )
    at_once = slower.pop("all at once", [])
    sentences = [
        f"With requests arriving {load}, the time per token with TurboAttention is {_range(times)} times that of the "
        "first row."
        for load, times in slower.items()
    ]
    if at_once:
        sentences.append(
            f"With all requests at once, the time per token is {_range(at_once)} times that of the first row, because "
            "more requests run concurrently; they also wait less for their first token. `--max-num-seqs` limits their "
            "number."
        )
    return " ".join(sentences)


def _without_fp8(document: dict[str, Any]) -> str:
    """A note on a table that was measured without vLLM's fp8 cache."""
    if any(row["contender"] == FP8.name for row in document["rows"]):
        return ""
    return (
        f" *{FP8.title}* was not measured in this table. It holds twice the tokens of 16 bits ([capacity](#capacity)); "
        "the tables of real models have its throughput."
    )


def _range(times: list[float]) -> str:
    return f"{min(times):.2f} to {max(times):.2f}"


def scenarios(document: dict[str, Any]) -> dict[tuple[int, str], dict[str, Rows]]:
    """Rounds by scenario (budget and load) and contender, in the order they ran; without an interrupted scenario, which
    not all contenders have run."""
    found: dict[tuple[int, str], dict[str, Rows]] = {}
    for row in document["rows"]:
        found.setdefault((row["budget"], load_of(row)), {}).setdefault(row["contender"], []).append(row)
    everyone = {row["contender"] for row in document["rows"]}
    return {scenario: runs for scenario, runs in found.items() if runs.keys() == everyone}


def middle(rows: Rows, name: str, at: str | None = None) -> float:
    """The median over the rounds."""
    return statistics.median(row[name] if at is None else row[name][at] for row in rows)
