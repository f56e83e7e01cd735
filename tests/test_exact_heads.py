"""Heads whose logits INT8 cannot represent, in calls without a cache."""

from __future__ import annotations

import warnings

import pytest
import torch

import turboattention as ta
from turboattention import exact_heads
from turboattention.config import TurboConfig
from turboattention.errors import GuardWarning
from turboattention.reference.exact import exact_attention

from .helpers import normals, qkv, relative_error

BOUND = 0.05
LOUD = 1
"""The KV head whose logits are large."""


def loud(queries: int = 200, keys: int = 200, factor: float = 30.0):
    """Two KV heads with three query heads each; the keys and queries of the second are `factor` times as long."""
    q, k, v = qkv(2, 6, 2, queries, keys, 32)
    q[:, 3:] *= factor
    k[:, LOUD:] *= factor
    return q, k, v


def error(got, want) -> list[float]:
    """Of each KV head."""
    return [relative_error(got[:, part], want[:, part]) for part in (slice(0, 3), slice(3, 6))]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "window_size": 50},
        {"window_size": 50},
        {"softcap": 3000.0},
        {"attn_mask": normals(2, 6, 200, 200, seed=9) > -1},
        {"attn_mask": normals(6, 1, 200, seed=9), "is_causal": True},
    ],
    ids=lambda options: "-".join(f"{k}{getattr(v, 'dim', str)()}" for k, v in options.items()) or "plain",
)
def test_computed_in_floating_point(backend, options, monkeypatch):
    monkeypatch.setattr(exact_heads, "_LOGITS", 50_000)  # several parts
    q, k, v = loud()
    want, want_lse = exact_attention(q, k, v, **options)
    without = ta.turbo_attention(q, k, v, config=TurboConfig(guard="off"), backend=backend, **options)
    assert error(without, want)[LOUD] > BOUND
    got, lse = ta.turbo_attention(q, k, v, return_lse=True, backend=backend, **options)
    assert error(got, want)[LOUD] < 1e-4
    assert torch.allclose(lse[:, 3:].double(), want_lse[:, 3:], rtol=1e-5)
    assert torch.equal(got[:, :3], without[:, :3])


def test_of_a_chunk():
    q, k, v = loud(40)
    got = ta.turbo_attention(q, k, v, is_causal=True)
    assert error(got, exact_attention(q, k, v, is_causal=True)[0])[LOUD] < 1e-4


def test_keys_with_a_large_mean():
    """The first block is stored with its mean."""
    q, k, v = qkv(1, 2, 2, 100, 500, 64)
    k = k + 60 * normals(1, 2, 1, 64, seed=7)
    got = ta.turbo_attention(q, k, v)
    assert relative_error(got, exact_attention(q, k, v)[0]) < 1e-4


def test_only_a_warning():
    q, k, v = loud()
    with pytest.warns(GuardWarning, match=r'^KV head 1 loses too much in INT8 attention .*guard="adapt" computes'):
        got = ta.turbo_attention(q, k, v, config=TurboConfig(guard="warn"))
    assert torch.equal(got, ta.turbo_attention(q, k, v, config=TurboConfig(guard="off")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_silent_where_int8_is_enough(dtype):
    """Compared, since the logits are large, and found within the bound."""
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 2, 100, 500, 64))
    k = (k.float() + 10 * normals(1, 2, 1, 64, seed=7)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ta.turbo_attention(q, k, v)
    assert torch.equal(got, ta.turbo_attention(q, k, v, config=TurboConfig(guard="off")))
    assert relative_error(got, exact_attention(q, k, v)[0]) < BOUND


def test_nothing_is_compared_where_logits_are_small(monkeypatch):
    monkeypatch.setattr(exact_heads, "_attend", None)
    ta.turbo_attention(*qkv(1, 2, 2, 100, 100, 64))


def test_without_keys_or_queries():
    for queries, keys in ((0, 5), (5, 0)):
        q, k, v = qkv(1, 2, 2, queries, keys, 16)
        assert ta.turbo_attention(q, k, v).shape == q.shape
