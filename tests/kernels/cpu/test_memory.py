"""Prefill's extra memory: it does not grow with queries times keys, and masks are read where they lie."""

from __future__ import annotations

import subprocess
import sys

import pytest

from . import tools  # noqa: F401

SCRIPT = """
import sys, torch
import turboattention as ta
torch.set_num_threads(2)
queries, keys, mask = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
q = torch.randn(1, 8, queries, 64)
k, v = torch.randn(2, 1, 2, 64, 64)
cache = ta.KVCache(1, 2, 64, config=ta.TurboConfig(guard="off"), max_tokens=keys + queries)
for _ in range(keys // 64):
    cache.append(k, v)
new = torch.randn(2, 1, 2, queries, 64)
options = {}
if mask != "none":
    dtype = getattr(torch, mask)
    shape = 1, 1, queries, keys + queries
    options["attn_mask"] = torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
ta.turbo_attention_with_kvcache(q[:, :, :2], cache, is_causal=False, backend="cpu")

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

open("/proc/self/clear_refs", "w").write("5")
before = peak()
ta.turbo_attention_with_kvcache(q, cache, *new, backend="cpu", **options)
print(peak() - before)
"""


def extra_mebibytes(queries: int, keys: int, mask: str = "none") -> float:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(queries), str(keys), mask], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


@pytest.mark.parametrize("queries", [16, 64, 512])
def test_the_keys_do_not_matter(queries):
    assert extra_mebibytes(queries, 32768) < extra_mebibytes(queries, 8192) + 4


@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "float16"])
def test_masks_are_not_copied(dtype):
    """At most a quarter of the mask's size (64 MiB in float32), in addition to the call without it."""
    assert extra_mebibytes(1024, 15360, dtype) < extra_mebibytes(1024, 15360) + 16
