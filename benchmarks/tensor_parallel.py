"""A model distributed over several processes with transformers' tensor parallelism, compared with a single process.

`torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --model NAME`

Every process generates with its own heads and its own TurboCache. Then the first process loads the whole model and
generates again. Without GPUs the processes communicate over gloo. Needs accelerate, with which transformers loads parts
of a model.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from turboattention import TurboConfig, bundled
from turboattention.cli.settings import load_calibration, parse_bits
from turboattention.errors import GuardWarning
from turboattention.integrations.transformers import TurboCache, enable


@dataclass(frozen=True)
class Outcome:
    """prompt: tokens; ids: the new ones; heads: KV heads of a layer held here; nbytes: of the cache, all layers;
    warnings: the guard's."""

    name: str
    prompt: int
    ids: list[int]
    heads: int
    nbytes: int
    fp16_nbytes: int
    warnings: list[str]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        report(arguments, [], generate(arguments, "single process"))
        return
    own = generate(arguments, f"rank {rank} of {size}", distributed_config=DistributedConfig(tp_size=size))
    ranks: list[Any] = [None] * size
    distributed.all_gather_object(ranks, own)
    if rank == 0:
        report(arguments, ranks, None if arguments.no_single else generate(arguments, "single process"))
    distributed.barrier()
    distributed.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a name on the hub; the bundled model by default")
    parser.add_argument("--file", type=Path, default=None, help="the prompt's text; the bundled one by default")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--bits", default="4", help='8, 4, 3, 2, K,V, or "mixed" with --calibration')
    parser.add_argument("--calibration", type=Path, default=None, help="what `turboattention calibrate` wrote")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--no-single", action="store_true", help="leave the single process out: it holds a whole model")
    return parser.parse_args()


def generate(arguments: argparse.Namespace, name: str, **options: Any) -> Outcome:
    """Greedy ids of a model loaded with `options`, over a new cache."""
    source = arguments.model or str(bundled.model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = arguments.file.read_text(encoding="utf-8") if arguments.file else bundled.text()
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : arguments.prompt_tokens]
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="turbo", dtype=getattr(torch, arguments.dtype), **options
    )
    if not options and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    config = TurboConfig(bits=parse_bits(arguments.bits))
    cache = TurboCache(model.config, config, calibration=load_calibration(arguments.calibration))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            past_key_values=cache,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
    kv = cache.layers[0].kv
    assert kv is not None
    told = [str(warning.message) for warning in caught if issubclass(warning.category, GuardWarning)]
    new = output[0, ids.shape[1] :].tolist()
    return Outcome(name, ids.shape[1], new, kv.num_kv_heads, cache.nbytes, cache.fp16_nbytes, told)


def report(arguments: argparse.Namespace, ranks: list[Outcome], single: Outcome | None) -> None:
    source = arguments.model or "the bundled model"
    rows = [*ranks, *([single] if single else [])]
    print(
        f"{source}, {arguments.dtype}, bits {arguments.bits}: {rows[0].prompt} tokens of prompt, {len(rows[0].ids)} new"
    )
    print(f"\n{'':16}{'KV heads':>10}{'KV bytes':>14}{'below FP16':>12}")
    for row in rows:
        smaller = f"{row.fp16_nbytes / row.nbytes:.2f}x"
        print(f"{row.name:16}{row.heads:10}{row.nbytes:14,}{smaller:>12}")
    for row in rows:
        print(f"\n{row.name}: {' '.join(map(str, row.ids))}")
        for message in row.warnings:
            print(f"  {message}")
    if single and ranks:
        print(f"\nsame tokens: {'yes' if all(row.ids == single.ids for row in ranks) else 'NO'}")


if __name__ == "__main__":
    main()
