"""The measured sections of docs/serving.md on capacity and correctness under load, and functions for all sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MIB = 2**20
FLOORS = {"turbo-4": 3.6, "turbo-3": 4.4}
"""Minimum number of tokens relative to 16-bit pages."""


def capacity(document: dict[str, Any], name: str) -> str:
    columns = ["model", "cache", "blocks", "tokens/GiB", "× 16 bits", "tokens/GiB with tail slots", "× 16 bits"]
    rows = []
    for row in document["rows"]:
        floor = FLOORS.get(row["contender"])
        note = "" if floor is None else f" (floor {floor}{'' if row['times'] >= floor else ', missed'})"
        blocks = f"{row['blocks']:,} of {row['block_size']} tokens"
        alone, both = f"{row['tokens_per_gib']:,}", f"{row['with_side_pool']:,}"
        paid = f"{row['times_with_side_pool']:.2f}"
        rows.append([row["model"], row["title"], blocks, alone, f"{row['times']:.2f}{note}", both, paid])
    pools = {row["model"]: row["side_pool_bytes"] for row in document["rows"] if row["side_pool_bytes"]}
    beside = ", ".join(f"{size / MIB:.1f} MiB for {model}" for model, size in pools.items())
    budget = document["budget"] / 2**30
    return "\n\n".join(
        [
            "## Capacity",
            machine(document["facts"]),
            f"Blocks of engines with `kv_cache_memory_bytes` of {budget:g} GiB and bfloat16 models. The tail slots, "
            f"which hold INT8 rows of incomplete blocks for each of `max_num_seqs` = {document['sequences']} "
            f"sequences, take additional memory of a fixed size ({beside}); the last two columns include it.",
            markdown(columns, rows),
            f"![tokens per GiB]({name}.png)",
        ]
    )


def soak(document: dict[str, Any], name: str) -> str:
    drafts = document.get("drafts")
    by_model = bool(drafts) and document.get("drafter") == "model"
    kind = "drafts by a model (the bundled one without the MLP of one layer)" if by_model else "n-gram drafts"
    text = (
        f"The bundled model in float32, greedy{f', up to {drafts} {kind} per step' if drafts else ''}: requests "
        "of random length run through an engine whose cache is too small for all of them. Each answer is compared with "
        "that of a run of one sequence at a time, without a prefix cache"
        f"{' and without drafts' if drafts else ''}; aborted requests are compared up to the abort. oneDNN's kernel "
        "cache is limited to 64 (`ONEDNN_PRIMITIVE_CACHE_CAPACITY=64`); by default it grows to 1,024 kernels, one for "
        "each number of rows, and resident memory grows with it under any attention backend."
    )
    if document.get("server"):
        text += " Then the API server is killed (SIGKILL) during requests, restarted, and sent the same requests."
    return "\n\n".join(
        [
            f"## Correctness under load{', with drafts by a model' if by_model else ', with drafts' if drafts else ''}",
            machine(document["facts"]),
            text,
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
        ["requests", f"{document['requests']:,}, {document['shared_prefixes']:,} of them with a shared prefix"],
        ["aborted", f"{document['taken_back']:,}"],
        ["cache", f"{document['blocks']:,} blocks of {document['block_size']} tokens, {document['bits']} bits"],
        ["preemptions", f"{document['num_preemptions']:,}"],
        *drafts,
        ["prompt tokens from shared blocks", f"{document['prefix_cache_hits']:,}"],
        ["tokens generated", f"{document['generated']:,}"],
        ["answers equal to a single run's", f"{answers['equal']:,}"],
        [
            f"answers that differ where the two largest logits are closer than {document['bound']:g}",
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


def machine(facts: dict[str, Any]) -> str:
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return f"**{where}**, vLLM {facts['vllm']}, torch {facts['torch']}, turboattention {facts['turboattention']}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
