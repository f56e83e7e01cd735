"""Attention in floating point against the exact reference."""

from __future__ import annotations

import pytest
import torch

from turboattention.float_attention import float_attention, float_lse, visible
from turboattention.params import AttentionParams
from turboattention.reference.exact import exact_attention

from .helpers import normals, qkv


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_equals_the_reference(dtype, causal, window, softcap, kind):
    q, k, v = qkv(2, 6, 2, 30, 40, 16, dtype=dtype)
    mask = {"none": None, "bool": normals(2, 6, 30, 40) > 0, "additive": normals(1, 6, 30, 1)}[kind]
    if mask is not None:
        mask[:, 3, 5] = False if kind == "bool" else -torch.inf  # a row that sees nothing
    params = AttentionParams(causal, 0.3, window, softcap, None)
    seen = visible(10 + torch.arange(30), 40, params)
    out, lse = float_attention(q, k, v, seen, params, mask), float_lse(q, k, seen, params, mask)
    want = exact_attention(q, k, v, mask, causal, 0.3, window_size=window, softcap=softcap)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == lse.dtype == kept
    for got, exact in zip((out, lse), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
