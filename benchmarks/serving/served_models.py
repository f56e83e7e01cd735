"""Real models behind vLLM's API server, at 4 bits and with vLLM's own attention: `python
benchmarks/serving/served_models.py smollm2=FOLDER qwen=FOLDER gemma3=FOLDER`, with the Python that has vLLM.

In float32, so that only the cache differs. Both servers complete a text, read one as a prompt, and, where the model's
template has them, answer a question and call a tool. Writes benchmarks/results/serving-models.json, in which other
models keep their rows, and ends with 1 where answers are too different; `page.py --table` then writes docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import models
import processes
from served import Abilities, Answers, ask
from server import Server

from turboattention.files import write_text

AGREEMENT, PERPLEXITY = 0.90, 0.03
"""Least share of places at which both rank the same token first; most that the text's perplexity may change."""

OPTIONS = {"dtype": "float32", "max-model-len": 2048, "max-num-seqs": 4, "max-num-batched-tokens": 512}
OPTIONS |= {"kv-cache-memory-bytes": 256 << 20, "block-size": 64, "enforce-eager": None}
TOOLS = {"enable-auto-tool-choice": None, "tool-call-parser": "hermes"}
_FROM = 64  # before this token, nothing is read from a packed block


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=models.labelled, nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, default=processes.RESULTS / "serving-models.json", help="file of results")
    options = parser.parse_args()
    facts = processes.call("facts_run", {}, {}, "facts")
    problems: list[str] = []
    for label, folder in options.models:
        row = _row(models.real_model(label, folder), Abilities.of(folder))
        print(json.dumps(row, indent=1), flush=True)
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else {}
        document = {"facts": facts, "bounds": [AGREEMENT, PERPLEXITY], "rows": rows | {label: row}}
        write_text(options.out, json.dumps(document, indent=1) + "\n")
        problems += [f"{label}: {problem}" for problem in problems_of(row)]
    print("\n".join(problems) or "no problems")
    return int(bool(problems))


def _row(model: models.Model, abilities: Abilities) -> dict[str, Any]:
    stock, ours = (_served(model, abilities, bits) for bits in ("", "4"))
    return compared(stock, ours)


def _served(model: models.Model, abilities: Abilities, bits: str) -> Answers:
    switches = OPTIONS | (TOOLS if abilities.tools else {})
    log = f"served-{model.title}-{bits or 'stock'}"
    with Server(model.folder, switches, {contenders.VARIABLE: bits}, log) as server:
        print(f"{log}: serves after {server.wait():.0f} s", flush=True)
        return ask(server, abilities)


def compared(stock: Answers, ours: Answers) -> dict[str, Any]:
    """places: of the text that are compared. agreement: share of them with the same likeliest token. perplexity: with
    vLLM's own attention. perplexity_change: relative. stock, turbo: what they said."""
    places = len(stock.best) - _FROM
    agreement = sum(a == b for a, b in zip(stock.best[_FROM:], ours.best[_FROM:], strict=True)) / places
    before, after = (sum(x.nats[_FROM:]) / places for x in (stock, ours))
    told = ("completion", "chat", "call", "told")
    return {
        "places": places,
        "agreement": agreement,
        "perplexity": math.exp(before),
        "perplexity_change": math.exp(after - before) - 1,
        **{who: {name: asdict(x)[name] for name in told} for who, x in (("stock", stock), ("turbo", ours))},
    }


def problems_of(row: dict[str, Any]) -> list[str]:
    """Answers that are too different. Texts may part where two tokens are about equally likely; facts may not."""
    stock, ours = row["stock"], row["turbo"]
    problems = []
    if row["agreement"] < AGREEMENT:
        problems.append(f"the same likeliest token at {row['agreement']:.1%} of {row['places']} places")
    if abs(row["perplexity_change"]) > PERPLEXITY:
        problems.append(f"perplexity {row['perplexity_change']:+.2%}")
    if len(ours["completion"]) < 40:
        problems.append(f"a short completion, {ours['completion']!r}")
    for name, fact in (("chat", "Paris"), ("told", "18")):
        if fact in (stock[name] or "") and fact not in (ours[name] or ""):
            problems.append(f"{name}: {ours[name]!r}, beside {stock[name]!r}")
    if ours["call"] != stock["call"]:
        problems.append(f"called {ours['call']}, beside {stock['call']}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
