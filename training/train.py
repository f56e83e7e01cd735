"""Trains the bundled model: `python training/train.py --books BOOKS --out DIR [--minutes 60]`.

Everything is a function of the seed and of how many steps fit the budget, which is counted in
processor time, so that a busy machine makes training longer and not worse. The length of the rows
grows with the share of the budget spent: most tokens are cheap, and the last ones stand in rows as
long as the context.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from data import Mixture
from model import Llama, Shape, huggingface_config, huggingface_weights
from safetensors.torch import load_file, save_file
from tokenizer import END, train_tokenizer
from tokenizers import Tokenizer

from turboattention.files import write_text, write_whole

# (share of the time at which it begins, row length)
CURRICULUM = ((0.0, 256), (0.1, 512), (0.4, 1024), (0.65, 2048), (0.85, 4096))

# First only looking up and copying, in short rows: induction heads form there within a few million
# tokens, and everything that is exact over a distance builds on them.
INDUCTION_SHARE = 0.1
INDUCTION = {"recall": 0.5, "copy": 0.5}
WARMUP = 0.01
COOLDOWN_START = 0.4


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    books = (options.books / "train.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(options.init / "tokenizer.json")) if options.init else train_tokenizer(books)
    tokenizer.save(str(options.out / "tokenizer.json"))
    source = options.books / "train.txt"
    mixture = Mixture(source, tokenizer, options.task_fraction, options.seed)
    induction = Mixture(source, tokenizer, 1.0, options.seed + 500, INDUCTION)
    print(f"{len(mixture.books):,} tokens of books", flush=True)

    model = Llama(Shape())
    if options.init:
        weights = load_file(options.init / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    model.to(device)
    step = torch.compile(model, dynamic=False) if options.compile else model
    optimizers = make_optimizers(model, options.peak)
    clock = time.monotonic if device.type == "cuda" else lambda: time.process_time() / torch.get_num_threads()
    start, last, seen, count, average = clock(), 0.0, 0, 0, math.nan
    while (share := (clock() - start) / (60 * options.minutes)) < 1:
        length = max(n for begin, n in CURRICULUM if share >= begin)
        source = mixture if options.skip_induction or share >= INDUCTION_SHARE else induction
        size = max(2, options.batch_tokens // length)
        tokens, targets, weights = (t.to(device) for t in source.batch(size, length))
        loss = step(tokens, targets, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule(share)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, count = seen + tokens.numel(), count + 1
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if share - last > 0.01:
            last = share
            rate = seen / (clock() - start)
            print(f"{share:6.1%} step {count} length {length} loss {average:.4f} {rate:,.0f} tok/s", flush=True)
            export(model, options.out)
    export(model, options.out)
    print(json.dumps({"steps": count, "tokens": seen, "minutes": options.minutes, "loss": average}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder with train.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="budget: processor time a thread (on a GPU, wall-clock time)"
    )
    parser.add_argument("--init", type=Path, help="folder of an earlier run to go on from (weights and tokenizer)")
    parser.add_argument("--batch-tokens", type=int, default=8_192)
    parser.add_argument("--skip-induction", action="store_true", help="begin with the whole mixture at once")
    parser.add_argument("--peak", type=float, default=4e-3, help="peak learning rate of the matrices")
    parser.add_argument("--task-fraction", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def make_optimizers(model: Llama, peak: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms; with peak rates."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1 or p is model.embed_tokens.weight]
    muon = torch.optim.Muon(matrices, lr=1.0, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, peak), (adam, 0.75 * peak)]


def schedule(share: float) -> float:
    """Warm-up, plateau, then linearly down to 2 % of the peak."""
    if share < WARMUP:
        return share / WARMUP + 1e-3
    return 1.0 if share < COOLDOWN_START else max(0.02, (1 - share) / (1 - COOLDOWN_START))


def export(model: Llama, out: Path) -> None:
    """The Hugging Face files: weights, config, tokenizer settings."""
    weights = huggingface_weights(model)
    write_whole(out / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    files = {
        "config.json": huggingface_config(model.shape),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": model.shape.context,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
