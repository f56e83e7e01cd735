"""Correctness under load in vLLM: `python benchmarks/serving/soak.py`, with the Python that has vLLM.

Requests of random length, some with shared prefixes, some aborted, run through an engine whose cache is so small that
it has to preempt. Each answer must equal its solo answer (greedy), unless the two largest logits at the first
difference are closer than --bound. Memory must not grow. Then the API server is killed in the middle of requests and
restarted. Writes benchmarks/results/serving-soak.json (with --drafts serving-soak-drafts.json, and by a model
serving-soak-drafts-model.json), and exits with 1 if anything is wrong; `page.py --table` then writes docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import models
import processes
from comparing import compare, memory_of
from restart import restart

from turboattention.files import write_text

_FLAT, _FLAT_FROM = 0.02, 400
"""Largest growth of memory, and the number of requests from which on it is checked: fewer do not warm up everything."""
# oneDNN, which multiplies in float32, compiles a kernel for each number of rows it meets, and keeps 1,024 of them: with
# vLLM's own attention, too, memory grows until all are there. A short list is full after the warm-up.
_FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
_FEWEST = 40
_SEQUENCES, _STEP_TOKENS, _LENGTH = 48, 512, 704
_KIB = 1024


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        return _soak(options, _drafting(options, Path(folder)))


def _soak(options: argparse.Namespace, drafting: dict[str, Any] | None) -> int:
    contender = contenders.BY_NAME[f"turbo-{options.bits}"]
    given, model = contender.environment() | _FEW_KERNELS, models.bundled_model()
    engine = {
        **model.options(),
        "dtype": "float32",
        "kv_cache_memory_bytes": options.cache_kib * _KIB,
        "max_num_seqs": _SEQUENCES,
        "max_num_batched_tokens": _STEP_TOKENS,
        "max_model_len": _LENGTH,
        "block_size": 64,
        "speculative_config": drafting,
    }
    spec = {"options": engine, "requests": options.requests, "seed": options.seed}
    print(f"{options.requests:,} requests together, {contender.title}", flush=True)
    load = processes.call("soak_run", spec, given, "soak")
    print("each alone", flush=True)
    solo = processes.call("solo_run", spec, given, "solo")
    document = _document(options, load, solo)
    if options.server:
        print("the API server", flush=True)
        document["server"] = _served(options, model.folder, given, solo, drafting)
    document["problems"] = _problems(document)
    write_text(options.out, json.dumps(document, indent=1) + "\n")
    _tell(document)
    return int(bool(document["problems"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="through the engine (default 2000)")
    parser.add_argument("--served", type=int, default=40, help="requests that the API server is asked at once")
    parser.add_argument("--bits", choices=("8", "4", "3", "2"), default="4", help="width (default 4)")
    parser.add_argument("--bound", type=float, default=0.05, help="logits that are closer count as equal")
    parser.add_argument("--cache-kib", type=int, default=3 * 1024, help="pages; small, so that it has to preempt")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    parser.add_argument("--no-server", dest="server", action="store_false", help="leave the API server out")
    parser.add_argument("--drafts", type=int, default=0, help="drafts that a step verifies, at most")
    parser.add_argument("--drafter", choices=("ngram", "model"), default="ngram", help="who drafts (default ngram)")
    parser.add_argument("--out", type=Path, help="the file of results (default: that of the page)")
    options = parser.parse_args()
    kind = "" if not options.drafts else "-drafts" if options.drafter == "ngram" else "-drafts-model"
    options.out = options.out or processes.RESULTS / f"serving-soak{kind}.json"
    if options.requests < _FEWEST:
        parser.error(f"--requests: expected {_FEWEST} or more, got {options.requests}")
    return options


def _drafting(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """For `speculative_config`: looks that find something in a text, right or wrong, or a model that is often wrong."""
    if not options.drafts:
        return None
    ngram = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    model = {"method": "draft_model", "model": str(models.drafter(folder / "drafter"))}
    return {"num_speculative_tokens": options.drafts, **(model if options.drafter == "model" else ngram)}


def _document(options: argparse.Namespace, load: dict[str, Any], solo: dict[str, Any]) -> dict[str, Any]:
    found = compare(load["answers"], solo["answers"], solo["gaps"], load["aborted"], options.bound)
    memory = memory_of(load["memory"])
    kept = ("blocks", "block_size", "tokens", "page_bytes", "side_pool_bytes", "num_preemptions")
    kept += ("prefix_cache_queries", "prefix_cache_hits", "shared_prefixes", "memory_every", "seconds")
    kept += ("draft_tokens", "accepted_tokens")
    return {
        "facts": load["facts"],
        "requests": options.requests,
        "bits": options.bits,
        "bound": options.bound,
        "drafts": options.drafts,
        "drafter": options.drafter,
        "generated": sum(map(len, load["answers"].values())),
        "taken_back": len(load["aborted"]),
        "answers": asdict(found),
        "memory": asdict(memory) | {"growth": memory.growth, "samples": load["memory"]},
        "solo_seconds": solo["seconds"],
        **{name: load[name] for name in kept},
    }


def _served(
    options: argparse.Namespace,
    folder: Path,
    given: dict[str, str],
    solo: dict[str, Any],
    drafting: dict[str, Any] | None,
) -> dict[str, Any]:
    """The server gets the first of the soak's requests; its answers are compared with the same solo answers."""
    names = list(solo["answers"])[: options.served]
    asked = {name: (solo["prompts"][name], len(solo["answers"][name])) for name in names}
    switches = {
        "dtype": "float32",
        "kv-cache-memory-bytes": options.cache_kib * _KIB,
        "max-num-seqs": _SEQUENCES,
        "max-num-batched-tokens": _STEP_TOKENS,
        "max-model-len": _LENGTH,
        "block-size": 64,
        "enforce-eager": None,
    }
    if drafting:
        switches["speculative-config"] = json.dumps(drafting)
    found = restart(folder, switches, given, asked)
    wanted = {name: solo["answers"][name] for name in names}
    both = {
        which: asdict(compare(found.pop(which), wanted, solo["gaps"], (), options.bound))
        for which in ("first", "second")
    }
    return {"requests": len(names), **found, **both}


def _problems(document: dict[str, Any]) -> list[str]:
    problems = [f"another answer than alone: {name}" for name in document["answers"]["wrong"]]
    if document["requests"] >= _FLAT_FROM and document["memory"]["growth"] > _FLAT:
        problems.append(f"memory grew by {document['memory']['growth']:.1%}")
    problems += [
        f"{name}: none" for name in ("num_preemptions", "taken_back", "prefix_cache_hits") if not document[name]
    ]
    if document["drafts"] and not 0 < document["accepted_tokens"] < document["draft_tokens"]:
        problems.append(f"drafts: {document['accepted_tokens']} of {document['draft_tokens']} accepted")
    server = document.get("server")
    if server:
        for which in ("first", "second"):
            problems += [f"{which} server, another answer: {name}" for name in server[which]["wrong"]]
        problems += [] if server["lost"] else ["the kill cut off no request"]
    return problems


def _tell(document: dict[str, Any]) -> None:
    answers, memory = document["answers"], document["memory"]
    print(
        f"{document['requests']:,} requests, {document['taken_back']} aborted, {document['num_preemptions']:,} "
        f"preemptions, {document['prefix_cache_hits']:,} prompt tokens from shared blocks, {document['generated']:,} "
        f"tokens, {document['accepted_tokens']:,} of {document['draft_tokens']:,} drafts accepted\n"
        f"{answers['equal']:,} answers equal to a single run's, {answers['close']} differ where the two best logits "
        f"are closer than {document['bound']:g} (at most {answers['widest']:.4f}), {len(answers['wrong'])} wrong\n"
        f"memory {memory['early'] / 2**20:.1f} MiB after the warm-up, {memory['late'] / 2**20:.1f} MiB at the end "
        f"({memory['growth']:+.2%})"
    )
    print("\n".join(document["problems"]) or "no problems")


if __name__ == "__main__":
    sys.exit(main())
