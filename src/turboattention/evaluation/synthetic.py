"""Synthetic tensors with properties of real models, from a seed, for the tables of docs/numerics.md."""

from __future__ import annotations

import numpy as np

KINDS = ("gauss", "bias", "bigbias", "sink")


def synthetic_qkv(
    kind: str, tokens: int = 1024, head_dim: int = 128, heads: int = 4, kv_heads: int = 1, seed: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 q [1, heads, tokens, D] and k, v [1, kv_heads, tokens, D].

    - ``gauss``: standard normal.
    - ``bias``: four key channels offset by 15, channels of unequal size, two large value channels.
    - ``bigbias``: the same with 60.
    - ``sink``: bigbias, with an attention sink: a first key of large norm with a small value.

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(heads, tokens, head_dim))
    k = rng.normal(size=(kv_heads, tokens, head_dim))
    v = rng.normal(size=(kv_heads, tokens, head_dim))
    if kind != "gauss":
        bias = np.zeros(head_dim)
        offset = 15.0 if kind == "bias" else 60.0
        bias[rng.choice(head_dim, 4, replace=False)] = offset * np.array([1, -1, 1, -1])
        k = k * np.exp(0.5 * rng.normal(size=head_dim)) + bias
        q = 0.8 * q * np.exp(0.3 * rng.normal(size=head_dim))
        v[..., rng.choice(head_dim, 2, replace=False)] *= 5
    if kind == "sink":
        direction = rng.normal(size=head_dim)
        direction /= np.linalg.norm(direction)
        q = q + 9 * direction
        k[:, 0] += 14 * direction
        v[:, 0] *= 0.05
    return q[None], k[None], v[None]


def long_context_sink(
    tokens: int, gap: float, head_dim: int = 64, seed: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One query q [1, 1, 1, D] over k, v [1, 1, tokens, D] whose first key's logit lies `gap` above
    all others, which are standard normal; the first value is small. Values have a common part, so
    that an output that loses most of the attention's mass is wrong by about as much."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(1, 1, 1, head_dim))
    k = rng.normal(size=(1, 1, tokens, head_dim))
    v = rng.normal(size=(1, 1, tokens, head_dim)) + rng.normal(size=head_dim)
    query = q[0, 0, 0]
    highest = (k[0, 0, 1:] @ query).max() / head_dim**0.5
    # Shift the first key along the query, to the desired logit.
    wanted, has = (highest + gap) * head_dim**0.5, k[0, 0, 0] @ query
    k[0, 0, 0] += (wanted - has) / (query @ query) * query
    v[:, :, 0] *= 0.05
    return q, k, v
