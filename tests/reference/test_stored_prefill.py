"""`stored_prefill`: complete earlier blocks in stored form, so that results do not depend on how a prompt was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta
from turboattention.kv.cache import KVCache

from ..helpers import qkv, relative_error
from .test_decode import OFF, call

STORED = OFF.replace(stored_prefill=True)


@pytest.mark.parametrize(
    "config",
    [STORED, STORED.replace(bits=2, sink_tokens=0), STORED.replace(bits=3, block_size=32)],
    ids=["default", "2 bits", "blocks of 32"],
)
@settings(max_examples=8)
@given(st.lists(st.integers(1, 299), max_size=5))
def test_stored_prefill_does_not_depend_on_chunks(config, cuts):
    q, k, v = qkv(1, 4, 2, 300, 300, 16)
    whole = call(KVCache(1, 2, 16, config=config), q, k, v, 0, 300)
    cache, start, parts = KVCache(1, 2, 16, config=config), 0, []
    for end in [*sorted(set(cuts)), 300]:
        parts.append(call(cache, q, k, v, start, end))
        start = end
    # Only the order in which blocks are summed may differ.
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=1e-5, atol=2e-6)


def test_without_it_results_do_depend_on_chunks():
    """Or the test above would show nothing."""
    q, k, v = qkv(1, 4, 2, 300, 300, 16)
    results = []
    for cuts in ((300,), (150, 300)):
        cache, start, parts = KVCache(1, 2, 16, config=OFF), 0, []
        for end in cuts:
            parts.append(call(cache, q, k, v, start, end))
            start = end
        results.append(torch.cat(parts, 2))
    assert float((results[0] - results[1]).abs().max()) > 1e-2


def test_stored_prefill_in_ragged_batches():
    q, k, v = qkv(2, 4, 2, 200, 200, 16)
    cache = KVCache(2, 2, 16, config=STORED)
    call(cache, q, k, v, 0, 90, lengths=torch.tensor([90, 30]))
    part = [torch.cat((x[:1, :, 90:200], x[1:, :, 30:140])) for x in (q, k, v)]
    got = ta.turbo_attention_with_kvcache(part[0], cache, *part[1:], lengths=torch.tensor([110, 110]))
    for b, (start, end) in enumerate(((90, 200), (30, 140))):
        alone = KVCache(1, 2, 16, config=STORED)
        want = call(alone, q[b : b + 1], k[b : b + 1], v[b : b + 1], 0, end)
        assert torch.allclose(got[b], want[0, :, start:], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        STORED,
        STORED.replace(bits="mixed"),
        ta.TurboConfig.paper(stored_prefill=True),
        ta.TurboConfig(stored_prefill=True),
    ],
    ids=["off", "mixed", "paper", "guard"],
)
def test_stored_prefill_reads_what_is_then_stored(config):
    """The last row of a prompt of whole blocks and one token, against a decode step over the same cache."""
    q, k, v = qkv(1, 4, 2, 257, 257, 16)
    cache = KVCache(1, 2, 16, config=config)
    got = call(cache, q, k, v, 0, 257)[:, :, -1:]
    again = ta.turbo_attention_with_kvcache(q[:, :, -1:], cache)
    # The paper's tile of one query row has another weight scale, and its buffer another key scale.
    assert relative_error(got, again) < (2e-2 if config.p_scale == "tile" else 1e-5)
    plain = ta.turbo_attention(q, k, v, is_causal=True, config=config)[:, :, -1:]
    assert relative_error(got, plain) > 0.03
