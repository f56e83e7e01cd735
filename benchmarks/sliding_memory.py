"""Bytes of caches after a sliding window, a crop or a selection: `python benchmarks/sliding_memory.py`.

One KV head of 64 channels, 4 bits; no model is needed. Prints the table of README.md, which `--write` puts there.
`--model FOLDER` also reads 6,000 random tokens with a sliding-window model, such as Gemma 3 270M, and prints its row of
README.md's other table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import turboattention as ta
from turboattention.files import write_text

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- sliding:begin -->\n", "<!-- sliding:end -->"


def cache(pieces: list[int], batch: int = 1, window: int | None = None) -> ta.KVCache:
    held = ta.KVCache(batch, 1, 64, window_size=window, config=ta.TurboConfig(guard="off"))
    generator = torch.Generator().manual_seed(0)
    for piece in pieces:
        held.append(*torch.randn(2, batch, 1, piece, 64, generator=generator))
    return held


def rows() -> list[tuple[str, int, int, int]]:
    """The operation, bytes before and after it, and those of a cache that never held more tokens."""
    table = []
    ways = {"one append": [6000], "appends of 100": [100] * 60, "token by token": [5900] + [1] * 100}
    for name, pieces in ways.items():
        slid = cache(pieces, window=512).nbytes
        table.append((f"window of 512 over 6,000 tokens, {name}", cache(pieces).nbytes, slid, cache([512]).nbytes))
    cut = cache([6000])
    before = cut.nbytes
    cut.crop(200)
    table.append(("crop from 6,000 tokens to 200", before, cut.nbytes, cache([200]).nbytes))
    chosen = cache([3000], batch=8)
    before = chosen.nbytes
    chosen.reorder(torch.tensor([3]))
    table.append(("1 of 8 rows of 3,000 tokens selected", before, chosen.nbytes, cache([3000]).nbytes))
    return table


def table(found: list[tuple[str, int, int, int]]) -> str:
    head = "| sliding windows, crops, selections | all tokens, bytes | after the operation | new cache |"
    return (
        "\n".join([head, "|---|---|---|---|", *(f"| {name} | {a:,} | {b:,} | {c:,} |" for name, a, b, c in found)])
        + "\n"
    )


def of_model(folder: str, step: int) -> str:
    """A row for a model: bytes after 6,000 random tokens of its own cache at 16 bits, and at 4 bits without and with
    `reorder_k`."""
    from transformers import AutoModelForCausalLM

    ta.integrations.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="turbo", dtype=torch.bfloat16)
    ids = torch.randint(5, 10_000, (1, 6000), generator=torch.Generator().manual_seed(0))
    cells, own = [], 0
    for reorder in (False, True):
        held = ta.integrations.transformers.TurboCache(model.config, ta.TurboConfig(reorder_k=reorder))
        with torch.no_grad():
            for at in range(0, 6000, step):
                model.get_decoder()(ids[:, at : at + step], past_key_values=held)
        own = sum(own_bytes(layer) for layer in held.attention_layers)
        cells.append(f"{held.nbytes:,} ({own / held.nbytes:.3f}x)")
    return f"| {Path(folder).name} | {own:,} | {' | '.join(cells)} |"


def own_bytes(layer: Any) -> int:
    """Bytes of a layer of transformers' own cache at 16 bits, which keeps all of a window's keys but one."""
    _, heads, head_dim, v_head_dim = layer.kv.token_shape
    tokens = layer.get_seq_length() if layer.window is None else min(layer.get_seq_length(), layer.window - 1)
    return 2 * tokens * heads * (head_dim + v_head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--step", type=int, default=6000, help="tokens of the model's prompt at once")
    options = parser.parse_args()
    text = table(rows())
    print(text)
    if options.write:
        head, rest = README.read_text(encoding="utf-8").split(BEGIN)
        write_text(README, head + BEGIN + text + END + rest.split(END)[1])
    if options.model:
        print(of_model(options.model, options.step))


if __name__ == "__main__":
    main()
