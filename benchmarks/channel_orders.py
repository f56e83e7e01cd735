"""The KL divergence with orders of K's channels from a calibration, from a cache's first block, and with no order.

    turboattention calibrate --model FOLDER --text BOOK --out CALIBRATION
    python benchmarks/channel_orders.py --model FOLDER --calibration CALIBRATION --text WIKITEXT2 --out RESULTS

prints the table of docs/numerics.md; an interrupted run resumes from RESULTS. *server* is `TurboConfig.serving()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from turboattention import Calibration, TurboConfig
from turboattention.evaluation import suite
from turboattention.evaluation.baselines.kinds import TurboMethod
from turboattention.evaluation.heap import release_large_blocks
from turboattention.evaluation.hf.subject import TransformersSubject
from turboattention.evaluation.records import Records
from turboattention.integrations.transformers import language_model, registry

BITS, CONTEXT, PIECE = (4, 3, 2), 2048, 64
ORDERS = ("none", "first block", "calibration", "server, none", "server, calibration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="made on another text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for results")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, help="rows of the table")
    parser.add_argument("--passages", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    release_large_blocks()
    torch.set_num_threads(options.threads)
    language = language_model.load(options.model, "cpu", "float32")
    text = suite.Options(options.text.read_text(), options.text.name, options.passages, CONTEXT, PIECE)
    chosen = suite.make_tasks(["perplexity"], text, language.context)
    # The guard chooses exact layers, for all rows alike.
    found = methods(replace(Calibration.load(options.calibration), exact_layers=()), options.orders)
    facts = {"model": options.model, "weights": language.fingerprint()}
    with registry.enabled():
        units = suite.run(TransformersSubject(language), found, chosen, Records(options.out), facts, announced)
        measured = {unit["method"]: unit for unit in units}
    print(f"{options.passages} passages of {CONTEXT:,} tokens\n{table(measured, options.orders)}")


def methods(found: Calibration, orders: Sequence[str]) -> list[TurboMethod]:
    """One for each width and each of `orders`."""
    assert found.k_order is not None, "the calibration has no orders"
    known = crc32(b"".join(bytes(order.table.numpy()) for order in found.k_order))

    def method(bits: int, order: str) -> TurboMethod:
        make = TurboConfig.serving if "server" in order else TurboConfig
        config, calibrated = make(bits=bits, reorder_k="none" not in order), "calibration" in order
        settings = f"{config.text}, {known if calibrated else 'no'} order"
        return TurboMethod(name(bits, order), name(bits, order), settings, config, found if calibrated else None)

    return [method(bits, order) for bits in BITS for order in orders]


def name(bits: int, order: str) -> str:
    return f"{bits}-{order.replace(', ', '-').replace(' ', '-')}"


@contextmanager
def announced(line: str) -> Iterator[Callable[..., None]]:
    print(line, flush=True)
    yield lambda *progress: None


def table(units: dict[str, dict[str, Any]], orders: Sequence[str]) -> str:
    def cell(unit: dict[str, Any]) -> str:
        kl, change = unit["metrics"]["kl"], unit["metrics"]["perplexity_change"]
        interval = f"{kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})"
        return f"{unit['bits_per_element']:.2f}, {interval}, {100 * change['value']:+.1f} %"

    head = f"| order | {' | '.join(f'{bits} bits' for bits in BITS)} |"
    rows = [f"| {order} | {' | '.join(cell(units[name(bits, order)]) for bits in BITS)} |" for order in orders]
    return "\n".join([head, "|" + "---|" * (1 + len(BITS)), *rows])


if __name__ == "__main__":
    main()
