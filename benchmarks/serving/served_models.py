"""Real models behind vLLM's API server: `python benchmarks/serving/served_models.py smollm2=FOLDER qwen=FOLDER
gemma3=FOLDER`, with the Python that has vLLM.

In float32, so that only the cache differs: the likeliest next token over a text, a completion, a chat, and a tool call,
over each cache and over vLLM's own with 16 or more bits. Writes benchmarks/results/serving-models.json after each
model, and exits with 1 if a model is below its floor; `page.py --table` then writes docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import engine
import models
import processes
from contenders import Contender
from questions import Answers, ask
from server import Server

from turboattention.files import write_text

OPTIONS = {"dtype": "float32", "max-model-len": 2048, "max-num-seqs": 4, "max-num-batched-tokens": 512}
OPTIONS |= {"kv-cache-memory-bytes": 256 << 20, "block-size": 64, "enforce-eager": None}
BLOCK = 64
CONTENDERS = (contenders.FP8, contenders.BY_NAME["turbo-4"], *contenders.CALIBRATED[:2])


@dataclass(frozen=True)
class Served:
    """Features of a model, and floors. checked: the cache to which the floors apply. template: of chats, where the
    model's folder has none. knows: whether its answer has to be right; a base model only has to answer. tools: whether
    it was trained with tools (SmolLM2's forced calls have no object as arguments with vLLM's own cache either).
    agreement: the smallest share of positions at which the likeliest token is that of vLLM's own cache. perplexity: the
    largest relative change."""

    checked: str
    template: str | None = None
    knows: bool = True
    tools: bool = False
    agreement: float = 0.90
    perplexity: float = 0.03


GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] | replace('assistant', 'model') }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
"""The turns that Gemma 3 was trained with; a base model's folder has no template."""

SERVED = {
    "smollm2": Served("turbo-4"),
    "qwen": Served("turbo-4-calibrated", tools=True),
    "gemma3": Served("turbo-4", GEMMA_TURNS, knows=False, perplexity=0.05),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER", help=f"real models: {', '.join(SERVED)}")
    parser.add_argument("--out", type=Path, default=processes.RESULTS / "serving-models.json", help="file of results")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.models)
    if not set(given) <= set(SERVED):
        parser.error(f"models: expected some of {', '.join(SERVED)}, got {', '.join(given)}")
    document: dict[str, Any] = {"models": []}
    for label, folder in given.items():
        document["models"].append(compare(label, Path(folder), CONTENDERS))
        document["facts"] = engine.facts()
        write_text(options.out, json.dumps(document, indent=1) + "\n")
        print("\n".join(told(document["models"][-1])), flush=True)
    below = [row for found in document["models"] for row in problems(found)]
    print("\n".join(below) or "no problems")
    return int(bool(below))


def compare(label: str, folder: Path, compared: Sequence[Contender]) -> dict[str, Any]:
    """Rows, the first of them vLLM's own cache."""
    model = models.real_model(label, folder)
    stock = _serve(model, label, contenders.STOCK)
    rows = [_row(contenders.STOCK, stock, stock)]
    rows += [_row(contender, _serve(model, label, contender), stock) for contender in compared]
    return {"label": label, "model": model.title, "tokens": len(stock.best), "rows": rows}


def problems(found: dict[str, Any]) -> list[str]:
    """In words."""
    floors = SERVED[found["label"]]
    (row,) = (row for row in found["rows"] if row["contender"] == floors.checked)
    where, stock = f"{found['model']}, {row['title']}", found["rows"][0]
    said = []
    if row["top1"] < floors.agreement:
        said.append(f"{where}: {row['top1']:.1%} of the likeliest tokens are equal, expected {floors.agreement:.0%}")
    if abs(row["perplexity"]) > floors.perplexity:
        said.append(f"{where}: perplexity {row['perplexity']:+.1%}, expected within {floors.perplexity:.0%}")
    if not row["chat"] or (floors.knows and "Paris" not in row["chat"]):
        said.append(f"{where}: expected an answer with Paris, got {row['chat']!r}")
    if floors.tools and (row["call"] != stock["call"] or row["call"] != ["get_weather", {"city": "Paris"}]):
        said.append(f"{where}: called {row['call']}, with vLLM's own cache {stock['call']}")
    if floors.tools and "18" not in row["told"]:
        said.append(f"{where}: expected the tool's 18 degrees, got {row['told']!r}")
    return said


def told(found: dict[str, Any]) -> list[str]:
    lines = [found["model"]]
    for row in found["rows"]:
        lines += [f"  {row['title']}: top-1 {row['top1']:.1%}, perplexity {row['perplexity']:+.2%}"]
        lines += [f"    {name}: {row[name]!r}" for name in ("completion", "chat", "call", "told") if row[name]]
    return lines


def _serve(model: models.Model, label: str, contender: Contender) -> Answers:
    served = SERVED[label]
    switches = {name.replace("_", "-"): value for name, value in contender.options().items()}
    if "additional-config" in switches:
        switches["additional-config"] = json.dumps(switches["additional-config"])
    switches |= {"enable-auto-tool-choice": None, "tool-call-parser": "hermes"} if served.tools else {}
    switches |= {"chat-template": served.template} if served.template else {}
    calibration = models.calibration(model, label) if contender.needs_calibration else None
    log = f"{label}-{contender.name}"
    with Server(model.folder, OPTIONS | switches, contender.environment(calibration), log) as server:
        server.wait()
        return ask(server, tools=served.tools)


def _row(contender: Contender, got: Answers, stock: Answers) -> dict[str, Any]:
    """top1: the share of positions, after the first block, at which the likeliest token is that of `stock`. perplexity:
    its relative change."""
    pairs = list(zip(got.best, stock.best, strict=True))[BLOCK:]  # before them nothing is read from a packed block
    return {
        "contender": contender.name,
        "title": contender.title,
        "top1": sum(a == b for a, b in pairs) / len(pairs),
        "perplexity": math.expm1(got.nats - stock.nats),
        "completion": got.completion,
        "chat": got.chat,
        "call": None if got.call is None else list(got.call),
        "told": got.told,
    }


if __name__ == "__main__":
    sys.exit(main())
