"""What each process of test_parallel.py does, and the test itself in a single one: generate, and write down.

    torchrun --nproc-per-node 2 parallel_worker.py FOLDER

FOLDER has the model, ``cases.json`` and a calibration; each process leaves ``rank0.json`` and so on there.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from turboattention import TurboConfig
from turboattention.calibration import Calibration
from turboattention.errors import TurboError
from turboattention.integrations.transformers import TurboCache, calibrate, enable

IDS = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
NEW = 12


def load(folder: Path, dtype: str, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="turbo", dtype=getattr(torch, dtype), **options
    )
    return model.eval()


def new_cache(model: Any, folder: Path, case: dict[str, Any]) -> TurboCache:
    calibration = Calibration.load(folder / "calibration") if case.get("calibrated") else None
    config = TurboConfig(block_size=16, sink_tokens=16, **case["config"])
    return TurboCache(model.config, config, calibration=calibration, head_bits=case.get("head_bits"))


def go_on(
    model: Any, cache: TurboCache, ids: torch.Tensor, padding: int = 0, options: dict[str, Any] | None = None
) -> list[list[int]]:
    """The ids that follow without sampling, where the first `padding` of the first row are none."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **(options or {})
    )
    return output[:, ids.shape[1] :].tolist()


def run(model: Any, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One case: the ids, and the cache behind them."""
    cache = new_cache(model, folder, case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = go_on(model, cache, IDS, case.get("padding", 0), case.get("options"))
    return {
        "ids": ids,
        "heads": [layer.kv.num_kv_heads for layer in cache.layers],
        "nbytes": cache.nbytes,
        "fp16_nbytes": cache.fp16_nbytes,
        "bits": [layer.kv.head_bits.tolist() for layer in cache.layers],
        "means": [None if layer.kv.given_mean is None else layer.kv.given_mean.tolist() for layer in cache.layers],
        "warnings": [str(warning.message) for warning in caught],
    }


def saved_and_loaded(model: Any, folder: Path, cache: TurboCache) -> dict[str, Any]:
    """A prompt of 70 tokens kept in a file in `folder`, and gone on from."""
    with torch.no_grad():
        model(IDS[:, :70], past_key_values=cache)
    cache.save(folder / "prompt.cache", IDS[:, :70])
    loaded = TurboCache.load(folder / "prompt.cache", model.config)
    loaded.save(folder / "again.cache")
    result = {"known": loaded.check_prompt(IDS), "first": first_heads(loaded), "ids": go_on(model, loaded, IDS)}
    loaded.reset()
    return {**result, "again": go_on(model, loaded, IDS), "first_again": first_heads(loaded)}


def first_heads(cache: TurboCache) -> list[int]:
    return [layer.kv.first_head for layer in cache.layers]


def refused(action: Any) -> str:
    try:
        action()
    except TurboError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(model: Any, folder: Path) -> dict[str, str]:
    def generated(**case: Any) -> Any:
        return lambda: go_on(model, new_cache(model, folder, case), IDS)

    return {
        "mixed": refused(generated(config={"bits": "mixed"})),
        "widths": refused(generated(config={}, head_bits=[[4, 4, 4]] * 2)),
        "calibrate": refused(lambda: calibrate(model, IDS[0].tolist())),
        "whole": refused(lambda: go_on(model, TurboCache.load(folder / "whole" / "prompt.cache"), IDS)),
        "unsaid": refused(lambda: TurboCache.load(f"{folder / 'prompt.cache'}.rank0of2")),
    }


def main() -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    folder, size, rank = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    cases = json.loads((folder / "cases.json").read_text())
    enable()
    results: dict[str, Any] = {}
    for dtype in ("float32", "float64"):
        model = load(folder, dtype, distributed_config=DistributedConfig(tp_size=size))
        results |= {name: run(model, folder, case) for name, case in cases.items() if case["dtype"] == dtype}
    results["saved"] = saved_and_loaded(model, folder, new_cache(model, folder, cases["calibrated"]))
    distributed.barrier()  # every file is there
    results["refusals"] = refusals(model, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
