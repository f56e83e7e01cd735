"""One call of decode or prefill at a size that is measured, for a profiler to look at: `profiling.py decode 4`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parent)]

import torch  # noqa: E402
from plan import REAL, TINY  # noqa: E402
from problem import filled_cache, normals  # noqa: E402
from timing import on_gpu  # noqa: E402

import turboattention as ta  # noqa: E402


def main(work: str, bits: str = "4", small: bool = False) -> None:
    plan = REAL if on_gpu() and not small else TINY
    with torch.inference_mode():
        if work == "decode":
            batch, tokens = plan.sweep_decode[-1]
            config = ta.TurboConfig(bits=int(bits), guard="off")
            cache = filled_cache(batch, plan.kv_heads, plan.head_dim, tokens, config)
            q = normals(batch, plan.heads, 1, plan.head_dim, seed=1)
            ta.turbo_attention_with_kvcache(q, cache, backend="triton")
        else:
            batch, tokens = plan.sweep_prefill[-1]
            q = normals(batch, plan.heads, tokens, plan.head_dim, seed=0)
            k, v = (normals(batch, plan.kv_heads, tokens, plan.head_dim, seed=seed) for seed in (1, 2))
            ta.turbo_attention(q, k, v, is_causal=True, backend="triton")
        if on_gpu():
            torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:3], small="--small" in sys.argv)
