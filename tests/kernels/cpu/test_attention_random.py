"""Random shapes, options and configurations: the C++ kernels against the reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from . import tools  # noqa: F401
from .attending import cache_both, prefill_both, unequal

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
HEADS = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 5, 8]))
HEAD_DIMS = st.integers(1, 32).map(lambda n: 8 * n) | st.sampled_from([8, 16, 64])
SOFTMAXES = [
    *[("block", p_scale, "exact") for p_scale in ("static", "row")] * 2,
    *[("running", "tile", rescale) for rescale in ("exact", "sas")],
]
LENGTHS = st.integers(1, 20) | st.integers(1, 200) | st.sampled_from([63, 64, 65, 128, 1030])


@st.composite
def configs(draw: st.DrawFn) -> ta.TurboConfig:
    row_max, p_scale, rescale = draw(st.sampled_from(SOFTMAXES))
    return ta.TurboConfig(
        guard="off",
        softmax=draw(st.sampled_from(["sas", "sas2", "exp"])),
        row_max=row_max,
        p_scale=p_scale,
        rescale=rescale,
        sas_threshold=draw(st.sampled_from([-6.0, -6.0, -2.0, -9.0])),
        smooth_k=draw(st.booleans()),
        rotate=draw(st.booleans()),
        reorder_k=draw(st.booleans()),
        token_scales=draw(st.sampled_from([True, True, True, False])),
        sink_tokens=draw(st.sampled_from([0, 64, 128])),
        search=draw(st.booleans()),
        flush_lag=draw(st.sampled_from([0, 0, 5, 70])),
        bits=draw(st.sampled_from([8, 4, 3, 2, "mixed", (4, 2), (2, 8)])),
    )


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "is_causal": draw(st.booleans()),
        "window_size": draw(st.none() | st.integers(1, 200)),
        "softcap": draw(st.none() | st.sampled_from([0.7, 4.0, 30.0])),
        "scale": draw(st.none() | st.sampled_from([0.05, 0.5])),
    }


def drawn_mask(data: st.DataObject, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    kind = data.draw(st.sampled_from(["none", "none", "bool", "additive"]))
    if kind == "none":
        return None
    shape = [size if data.draw(st.booleans()) else 1 for size in (batch, heads, queries, keys)]
    values = normals(*shape, seed=11)
    return values > -0.5 if kind == "bool" else values.masked_fill(values > 1, -torch.inf)


@given(
    data=st.data(), config=configs(), batch=st.integers(1, 3), heads=HEADS, queries=LENGTHS, keys=LENGTHS,
    head_dim=HEAD_DIMS, dtype=DTYPES, how=options()
)  # fmt: skip
@settings(max_examples=120)
def test_prefill(data, config, batch, heads, queries, keys, head_dim, dtype, how):
    kv_heads, group = heads
    queries = min(queries, 200)
    q, k, v = qkv(batch, kv_heads * group, kv_heads, queries, keys, head_dim, seed=queries + keys, dtype=dtype)
    mask = drawn_mask(data, batch, kv_heads * group, queries, keys)
    prefill_both(q, k, v, mask, config=config, **how)


@given(data=st.data(), config=configs(), batch=st.integers(1, 3), heads=HEADS, head_dim=HEAD_DIMS, dtype=DTYPES)
@settings(max_examples=60)
def test_several_calls_over_a_cache(data, config, batch, heads, head_dim, dtype):
    kv_heads, group = heads
    own_window = data.draw(st.none() | st.none() | st.integers(1, 150))
    cache = KVCache(batch, kv_heads, head_dim, config=config, window_size=own_window)
    for step in range(3):
        tokens = data.draw(LENGTHS if step == 0 else st.integers(1, 40))
        counts = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(batch)])
        ragged = data.draw(st.booleans())
        q, k, v = qkv(batch, kv_heads * group, kv_heads, tokens, tokens, head_dim, seed=step, dtype=dtype)
        k = unequal(k).to(dtype)
        how = data.draw(options())
        if own_window is not None:
            how["window_size"] = min(how["window_size"] or own_window, own_window)
        if ragged:
            how["lengths"] = counts
            for b in range(batch):
                for x in (q, k, v):
                    x[b, :, counts[b] :] = torch.nan
        ends = cache.seq_lens + (counts if ragged else tokens)
        mask = drawn_mask(data, batch, kv_heads * group, tokens, int(ends.max()))
        cache_both(q, cache, k, v, attn_mask=mask, **how)
