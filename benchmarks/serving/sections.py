"""The measured sections of docs/serving.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

MIB = 2**20
FLOORS = {"turbo-4": 3.6, "turbo-3": 4.4}
"""Times the tokens of 16-bit pages."""

Rows = list[dict[str, Any]]


def capacity(document: dict[str, Any], name: str) -> str:
    columns = ["model", "cache", "blocks", "tokens/GiB", "times 16 bits", "tokens/GiB, side pool paid", "times"]
    rows = []
    for row in document["rows"]:
        floor = FLOORS.get(row["contender"])
        told = "" if floor is None else f" (floor {floor}{'' if row['times'] >= floor else ', missed'})"
        blocks = f"{row['blocks']:,} of {row['block_size']}"
        alone, both = f"{row['tokens_per_gib']:,}", f"{row['with_side_pool']:,}"
        paid = f"{row['times_with_side_pool']:.2f}"
        rows.append([row["model"], row["title"], blocks, alone, f"{row['times']:.2f}{told}", both, paid])
    pools = {row["model"]: row["side_pool_bytes"] for row in document["rows"] if row["side_pool_bytes"]}
    beside = ", ".join(f"{size / MIB:.1f} MiB for {model}" for model, size in pools.items())
    budget = document["budget"] / 2**30
    return "\n\n".join(
        [
            "## Capacity",
            machine(document["facts"]),
            f"Blocks of engines with `kv_cache_memory_bytes` of {budget:g} GiB and bfloat16 models. The side pool, "
            f"INT8 rows of the blocks that are not full yet, has a slot for each of `max_num_seqs` = "
            f"{document['sequences']} sequences ({beside}) and lies beside the pages, whatever their number; the last "
            "two columns count it.",
            markdown(columns, rows),
            f"![tokens per GiB]({name}.png)",
        ]
    )


def throughput(document: dict[str, Any], name: str) -> str:
    plan = document["plan"]
    columns = ["cache, requests", "attention", "output tokens/s", "times", "at once", "preemptions"]
    columns += ["first token, s (p50, p95)", "then ms a token (mean, p50, p95)"]
    rows = []
    for (budget, rate), found in scenarios(document).items():
        base = next(iter(found.values()))
        for mine in found.values():
            times = middle(base, "seconds") / middle(mine, "seconds")
            what = f"{budget / MIB:,.0f} MiB, {'all at once' if rate is None else f'{rate:g} a second'}"
            cells = [f"{middle(mine, 'output_tokens_per_second'):.0f}", f"{times:.2f}"]
            cells += [f"{middle(mine, 'tokens_a_step'):.1f}", f"{middle(mine, 'num_preemptions'):.0f}"]
            cells += [", ".join(f"{middle(mine, 'first_token', at):.2f}" for at in ("p50", "p95"))]
            cells += [", ".join(f"{middle(mine, 'per_token', at) * 1e3:.1f}" for at in ("mean", "p50", "p95"))]
            rows.append([what, mine[0]["title"], *cells])
    lengths = f"prompts of {plan['prompt'][0]:,} to {plan['prompt'][1]:,} tokens, {plan['output'][0]} to "
    lengths += f"{plan['output'][1]} generated"
    return "\n\n".join(
        [
            f"## Throughput under a fixed cache, {document['model']}",
            machine(document["facts"]),
            f"{plan['requests']} requests, {lengths}, bfloat16, medians over {document['rounds']} rounds, in which the "
            "contenders take turns, each in a separate engine. The cache size is the total memory for keys and values "
            f"with TurboAttention's side pool for up to {plan['sequences']} sequences. *At once*: tokens per step, "
            "on average. *Times*: the speedup over the first line for all requests; with staggered arrivals "
            "the arrival rate is the limit.",
            markdown(columns, rows),
            _latency(document),
            f"![throughput and latency, all at once]({name}.png)",
        ]
    )


def _latency(document: dict[str, Any]) -> str:
    """The time per token with staggered arrivals, and with all requests at once, in words."""
    slower: dict[bool, list[float]] = {True: [], False: []}
    for (_, rate), found in scenarios(document).items():
        base, *others = found.values()
        slower[rate is None] += [
            middle(mine, "per_token", "mean") / middle(base, "per_token", "mean") for mine in others
        ]
    at_once, by_and_by = ([f"{x:.2f}" for x in sorted(slower[kind])] for kind in (True, False))
    told = []
    if by_and_by:
        told.append(
            f"At low load, a token takes {by_and_by[0]} to {by_and_by[-1]} times as long as with vLLM's own attention: "
            "this model's layers are small, so the fixed cost of a step dominates."
        )
    if at_once:
        told.append(
            f"With all requests at once it takes {at_once[0]} to {at_once[-1]} times as long, because more requests "
            "run concurrently and wait less for their first token; `--max-num-seqs` limits this."
        )
    return " ".join(told)


def soak(document: dict[str, Any], name: str) -> str:
    drafts = document.get("drafts")
    told = (
        f"The bundled model in float32, greedy{f', up to {drafts} n-gram drafts a step' if drafts else ''}: requests "
        "of random length run through an engine whose cache is too small for all of them. Each answer is compared with "
        "that of a run of one sequence at a time, without a prefix cache"
        f"{' and without drafts' if drafts else ''}; aborted requests are compared up to the abort. oneDNN's kernel "
        "cache is limited to 64 (`ONEDNN_PRIMITIVE_CACHE_CAPACITY=64`); by default it grows to 1,024 kernels, one for "
        "each number of rows, and resident memory grows with it under any attention backend."
    )
    if document.get("server"):
        told += " Then the API server is killed (SIGKILL) during requests, restarted, and sent the same requests."
    return "\n\n".join(
        [
            f"## Correctness under load{', with drafts' if drafts else ''}",
            machine(document["facts"]),
            told,
            markdown(["", ""], _soaked(document) + _restarted(document.get("server"))),
            "\n".join(f"- {problem}" for problem in document["problems"]) or "No problems were found.",
        ]
    )


def _soaked(document: dict[str, Any]) -> list[list[str]]:
    answers, memory = document["answers"], document["memory"]
    drafts = []
    if document.get("drafts"):
        accepted, rejected = document["accepted_tokens"], document["draft_tokens"] - document["accepted_tokens"]
        drafts = [["drafts accepted, rejected", f"{accepted:,}, {rejected:,}"]]
    return [
        ["requests", f"{document['requests']:,}, {document['shared_prefixes']:,} of them behind a shared prefix"],
        ["aborted", f"{document['taken_back']:,}"],
        ["cache", f"{document['blocks']:,} blocks of {document['block_size']} tokens, {document['bits']} bits"],
        ["preemptions", f"{document['num_preemptions']:,}"],
        *drafts,
        ["prompt tokens from shared blocks", f"{document['prefix_cache_hits']:,}"],
        ["tokens generated", f"{document['generated']:,}"],
        ["answers equal to a single run's", f"{answers['equal']:,}"],
        [
            f"answers that differ where the two best logits are closer than {document['bound']:g}",
            f"{answers['close']:,}" + (f" (at most {answers['widest']:.4f})" if answers["close"] else ""),
        ],
        ["wrong answers", f"{len(answers['wrong']):,}"],
        [
            "resident memory after the warm-up, at the end",
            f"{memory['early'] / MIB:.1f} MiB, {memory['late'] / MIB:.1f} MiB ({memory['growth']:+.2%})",
        ],
    ]


def _restarted(server: dict[str, Any] | None) -> list[list[str]]:
    if not server:
        return []
    both = ", ".join(f"{server[which]['equal'] + server[which]['close']}" for which in ("first", "second"))
    return [
        ["API server: concurrent requests", f"{server['requests']}"],
        ["answers equal to a single run's, before the kill and after the restart", both],
        ["requests interrupted by the kill", f"{server['lost']}"],
    ]


def scenarios(document: dict[str, Any]) -> dict[tuple[int, float | None], dict[str, Rows]]:
    """Rounds by scenario and contender, in the order they ran."""
    found: dict[tuple[int, float | None], dict[str, Rows]] = {}
    for row in document["rows"]:
        found.setdefault((row["budget"], row["rate"]), {}).setdefault(row["contender"], []).append(row)
    return found


def middle(rows: Rows, name: str, at: str | None = None) -> float:
    """Of the rounds, the median."""
    return statistics.median(row[name] if at is None else row[name][at] for row in rows)


def machine(facts: dict[str, Any]) -> str:
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return f"**{where}**, vLLM {facts['vllm']}, torch {facts['torch']}, turboattention {facts['turboattention']}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
