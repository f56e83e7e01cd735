"""`TurboConfig.paper()` in the reference against an independent float64 model of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import turboattention as ta

from . import paper_model

CASES = [
    # heads, KV heads, queries, keys, head_dim, causal
    (4, 2, 256, 256, 64, True),
    (4, 1, 200, 200, 128, True),
    (2, 2, 130, 193, 96, True),
    (8, 2, 64, 300, 64, False),
    (2, 1, 1, 257, 128, False),
    (2, 2, 7, 7, 40, True),
]


@pytest.mark.parametrize("heads, kv_heads, queries, keys, head_dim, causal", CASES)
@pytest.mark.parametrize("outliers", [False, True])
def test_reference_agrees_with_the_papers_formulas(heads, kv_heads, queries, keys, head_dim, causal, outliers):
    rng = np.random.default_rng(keys + head_dim)
    q = rng.normal(size=(heads, queries, head_dim))
    k = rng.normal(size=(kv_heads, keys, head_dim))
    v = rng.normal(size=(kv_heads, keys, head_dim))
    if outliers:
        k[..., :2] += 12.0
        v[:, 3] *= 9.0
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    wanted = paper_model.attention(*(x.astype(np.float64) for x in (q, k, v)), causal)
    got = ta.turbo_attention(
        *(torch.from_numpy(x)[None] for x in (q, k, v)),
        is_causal=causal,
        config=ta.TurboConfig.paper(),
        backend="reference",
    )[0].numpy()
    difference = np.linalg.norm(got - wanted, axis=-1)
    size = np.linalg.norm(wanted, axis=-1)
    # Single codes flip at rounding ties between float32 and float64; most rows have none.
    assert np.median(difference / size) <= 1e-5
    assert np.linalg.norm(difference) / np.linalg.norm(size) <= 1e-3


def test_float64_reference_is_the_papers_formulas_to_rounding():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 150, 64)) for _ in range(3))
    wanted = paper_model.attention(q, k, v, True)
    tensors = (torch.from_numpy(x)[None] for x in (q, k, v))
    got = ta.turbo_attention(*tensors, is_causal=True, config=ta.TurboConfig.paper(), backend="reference")[0].numpy()
    # Only float64 rounding is left: no code flips.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
