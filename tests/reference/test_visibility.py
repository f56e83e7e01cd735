"""Who sees which key, against a decision made for one query and one key at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.reference.exact import exact_attention
from turboattention.reference.visibility import Visibility

from ..helpers import normals, qkv


def sees(position: int, key: int, length: int, causal: bool, window: int | None) -> bool:
    if key >= length or (causal and key > position):
        return False
    return window is None or abs(position - key) < window


def decide(positions, lengths, keys, causal, window) -> torch.Tensor:
    """bool [B, Lq, Lk]."""
    return torch.tensor(
        [
            [[sees(p, k, n, causal, window) for k in range(keys)] for p in row]
            for row, n in zip(positions, lengths, strict=True)
        ]
    ).view(len(positions), len(positions[0]), keys)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(-3, 40), min_size=5, max_size=5), min_size=1, max_size=2),
    st.booleans(),
    st.none() | st.integers(1, 20),
    st.sampled_from((0, 8, 16)),
    st.data(),
)
def test_scores_are_hidden_key_by_key(positions, causal, window, first, data):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=len(positions), max_size=len(positions)))
    seen = Visibility(torch.tensor(positions), torch.tensor(lengths), causal, window, None, 4)
    scores = torch.zeros(len(positions), 2, 3, 2, 3, 8)  # [B, Hkv, blocks, group, rows, block]
    got = seen.apply(scores, first, slice(1, 4), 2)
    want = decide(positions, lengths, first + 24, causal, window)[:, 1:4, first:]
    for block in range(3):
        part = want[:, None, None, :, 8 * block : 8 * block + 8].expand(-1, 2, 2, -1, -1)
        assert torch.equal(got[:, :, block] == 0, part)
        assert bool((got[:, :, block][~part] == -torch.inf).all())


@settings(max_examples=60)
@given(st.integers(-10, 60), st.integers(1, 40), st.booleans(), st.none() | st.integers(1, 20), st.integers(0, 60))
def test_rows_leave_out_no_query_that_sees_something(start, count, causal, window, first):
    positions = [list(range(start, start + count))]
    seen = Visibility(torch.tensor(positions), torch.tensor([200]), causal, window, None, 1)
    rows = seen.rows(first, first + 8, 8)
    want = decide(positions, [200], first + 8, causal, window)[0, :, first:].any(-1)
    useful = want.nonzero().flatten().tolist()
    assert set(useful) <= set(range(rows.start, rows.stop))
    assert rows.start % 8 == 0 or rows.start == rows.stop
    if causal and window is None and useful:
        assert rows.stop == useful[-1] + 1
        assert rows.start == useful[0] // 8 * 8


def test_blocks_of_their_own_and_blocks_behind():
    """`own` splits queries: those in a key's block (or before it), and those after it."""
    positions = torch.arange(24)[None]
    seen = Visibility(positions, torch.tensor([24]), True, None, None, 1)
    scores = torch.zeros(1, 1, 3, 1, 24, 8)
    own, behind = (seen.apply(scores, 0, slice(0, 24), 1, which) == 0 for which in (True, False))
    everything = seen.apply(scores, 0, slice(0, 24), 1) == 0
    assert not bool((own & behind).any())
    assert torch.equal(own | behind, everything)
    for block in range(3):
        assert own[0, 0, block, 0].any(-1).nonzero().flatten().tolist() == list(range(8 * block, 8 * block + 8))


SHAPES = [
    (b, h, q, k) for b in (1, 2) for h in (1, 4) for q in (1, 5) for k in (1, 21)
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_every_broadcast_shape(shape, additive):
    mask = normals(*shape) if additive else normals(*shape) > 0
    full = mask.expand(2, 4, 5, 21)
    seen = Visibility(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([21, 21]), False, None, mask, 4)
    scores = normals(2, 2, 2, 2, 3, 16, seed=4)  # keys 0 to 31, of which the mask has 21
    got = seen.apply(scores, 0, slice(1, 4), 2)
    for key in range(21):
        part = full[:, :, 1:4, key].unflatten(1, (2, 2))
        old, new = scores[:, :, key // 16, :, :, key % 16], got[:, :, key // 16, :, :, key % 16]
        assert torch.equal(new, old + part if additive else torch.where(part, old, -torch.inf))
    assert bool((got[:, :, 1, :, :, 5:] == -torch.inf).all())


# -- exact attention, what every error is measured against, one query at a time ---------------------------


def one_by_one(q, k, v, lengths, causal, window, softcap, scale, mask):
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = lengths[b] - q.shape[2] + i
                keys = [j for j in range(lengths[b]) if sees(position, j, lengths[b], causal, window)]
                keys = [j for j in keys if mask is None or mask.dtype != torch.bool or mask[b, h, i, j]]
                logits = [float(q[b, h, i] @ k[b, h // group, j]) * scale for j in keys]
                if softcap is not None:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                if mask is not None and mask.dtype != torch.bool:
                    logits = [x + float(mask[b, h, i, j]) for x, j in zip(logits, keys, strict=True)]
                total = sum(math.exp(x) for x in logits)
                if total > 0:
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum(
                        v[b, h // group, j] * (math.exp(x) / total) for x, j in zip(logits, keys, strict=True)
                    )
    return out, lse


@pytest.mark.parametrize("queries, keys", [(7, 7), (3, 9), (9, 3), (1, 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("extra", ["plain", "bool mask", "additive mask", "softcap", "lengths", "scale"])
def test_exact_attention(queries, keys, causal, window, extra):
    q, k, v = qkv(2, 4, 2, queries, keys, 8, dtype=torch.float64)
    mask, softcap, scale, lengths = None, None, 8**-0.5, [keys, keys]
    if extra == "bool mask":
        mask = normals(2, 4, queries, keys) > -0.3
    elif extra == "additive mask":
        mask = normals(2, 4, queries, keys).double()
        mask[..., 0] = -torch.inf
    elif extra == "softcap":
        softcap = 1.5
    elif extra == "scale":
        scale = 1.3
    elif extra == "lengths":
        lengths = [keys, keys // 2]
        k[1, :, keys // 2 :] = v[1, :, keys // 2 :] = torch.nan
    got, lse = exact_attention(
        q, k, v, mask, causal, scale, window_size=window, softcap=softcap, lengths=torch.tensor(lengths)
    )
    want, want_lse = one_by_one(q, k, v, lengths, causal, window, softcap, scale, mask)
    # Two orders of summing float64.
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-12)


def test_exact_attention_agrees_with_sdpa_where_their_alignment_agrees():
    q, k, v = qkv(2, 4, 2, 33, 33, 16, dtype=torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(exact_attention(q, k, v, is_causal=True)[0], want, rtol=0, atol=1e-12)


def test_exact_attention_without_keys():
    q, k, v = qkv(1, 2, 1, 3, 0, 8)
    out, lse = exact_attention(q, k, v)
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
