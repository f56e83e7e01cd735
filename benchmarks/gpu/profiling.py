"""One call of decode or prefill at a size that is measured, for a profiler to look at: `profiling.py decode 4`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parent)]

import torch  # noqa: E402
from plan import REAL, TINY  # noqa: E402
from problem import filled_cache, normals  # noqa: E402
from timing import on_gpu  # noqa: E402

import turboattention as ta  # noqa: E402


def main(work: str, bits: str = "4", small: bool = False) -> None:
    with torch.inference_mode():
        call_of(work, int(bits), small)()
        if on_gpu():
            torch.cuda.synchronize()


def call_of(work: str, bits: int = 4, small: bool = False) -> Callable[[], object]:
    plan = REAL if on_gpu() and not small else TINY
    if work == "decode":
        batch, tokens = plan.sweep_decode[-1]
        cache = filled_cache(batch, plan.kv_heads, plan.head_dim, tokens, ta.TurboConfig(bits=bits, guard="off"))
        q = normals(batch, plan.heads, 1, plan.head_dim, seed=1)
        return lambda: ta.turbo_attention_with_kvcache(q, cache, backend="triton")
    batch, tokens = plan.sweep_prefill[-1]
    q = normals(batch, plan.heads, tokens, plan.head_dim, seed=0)
    k, v = (normals(batch, plan.kv_heads, tokens, plan.head_dim, seed=seed) for seed in (1, 2))
    return lambda: ta.turbo_attention(q, k, v, is_causal=True, backend="triton")


def traced(work: str, calls: int = 3) -> str:
    """A table of what some calls, after one that compiles, spend their time on."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.inference_mode():
        call = call_of(work)
        call()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                call()
            if on_gpu():
                torch.cuda.synchronize()
    by = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)


if __name__ == "__main__":
    main(*sys.argv[1:3], small="--small" in sys.argv)
