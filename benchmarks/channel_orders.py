"""Errors of attention with orders of K's channels from a calibration, from a cache's first block, and with no order.

    turboattention calibrate --model FOLDER --text BOOK --out CALIBRATION
    python benchmarks/channel_orders.py --model FOLDER --calibration CALIBRATION --text WIKITEXT2

prints the table of docs/numerics.md. Queries, keys and values are those of the model on the text. K is stored at the
width, V is exact; the error is relative (Frobenius norm, per KV head), its mean over all heads of all layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import turboattention as ta
from turboattention.integrations.transformers import language_model
from turboattention.integrations.transformers.recording import recorded_attention
from turboattention.kv.channel_order import ChannelOrder
from turboattention.reference.exact import exact_attention

BITS, FIRST = (4, 3, 2), 128
ORDERS = ("none", "first block", "calibration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="made on another text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    language = language_model.load(options.model, "cpu", "float32")
    orders = ta.Calibration.load(options.calibration).k_order
    assert orders is not None, "the calibration has no orders"
    ids = language.encode(options.text.read_text(encoding="utf-8")[: 8 * options.tokens])[: options.tokens]
    with torch.no_grad(), recorded_attention(language.model) as calls:
        language.model.model(torch.tensor([ids]))
    errors = torch.stack([layer(calls[index].q, calls[index].k, calls[index].v, o) for index, o in enumerate(orders)])
    print(f"{len(ids):,} tokens, {len(orders)} layers\n{table(errors)}")


def layer(q: Tensor, k: Tensor, v: Tensor, order: ChannelOrder) -> Tensor:
    """float64 [orders, bits, Hkv], errors of the output of the later half of the queries."""
    half = q[:, :, q.shape[2] // 2 :]
    exact = exact_attention(half, k, v, is_causal=True)[0]
    group = q.shape[1] // k.shape[1]
    found = [[stored(q, k, v, bits, name, order) for bits in BITS] for name in ORDERS]
    outs = [[exact_attention(half, keys, v, is_causal=True)[0] for keys in row] for row in found]
    return torch.stack([torch.stack([per_head(out, exact, group) for out in row]) for row in outs])


def stored(q: Tensor, k: Tensor, v: Tensor, bits: int, name: str, order: ChannelOrder) -> Tensor:
    """Keys after quantization in a cache that attends to the first tokens, as in use."""
    config = ta.TurboConfig(bits=bits, reorder_k=name != "none", guard="off")
    given = order if name == "calibration" else None
    cache = ta.KVCache(1, k.shape[1], k.shape[3], config=config, k_order=given)
    ta.turbo_attention_with_kvcache(q[:, :, :FIRST], cache, k[:, :, :FIRST], v[:, :, :FIRST])
    cache.append(k[:, :, FIRST:], v[:, :, FIRST:])
    return cache.dequantize()[0]


def per_head(out: Tensor, exact: Tensor, group: int) -> Tensor:
    squares = [x.double().square().sum((0, 2, 3)).unflatten(0, (-1, group)).sum(1) for x in (out - exact, exact)]
    return (squares[0] / squares[1]).sqrt()


def table(errors: Tensor) -> str:
    """errors: [layers, orders, bits, Hkv]."""
    means = errors.mean((0, 3))
    head = f"| order | {' | '.join(f'{bits} bits' for bits in BITS)} |"
    rows = [f"| {name} | {' | '.join(f'{x:.4f}' for x in row)} |" for name, row in zip(ORDERS, means, strict=True)]
    return "\n".join([head, "|" + "---|" * (1 + len(BITS)), *rows])


if __name__ == "__main__":
    main()
