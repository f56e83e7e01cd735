"""The cache does not depend on how tokens arrive: split into calls, padded, or batched with other sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention as ta

from .tools import PLAIN, append_range, attend, content, filled, sequence_content, tokens

CONFIGS = {
    "4 bits": PLAIN,
    "3 bits": PLAIN.replace(bits=3),
    "K 4 V 2, no sinks": PLAIN.replace(bits=(4, 2), sink_tokens=0, search=False),
    "small blocks": PLAIN.replace(bits=2, block_size=16, sink_tokens=32),
    "lag": PLAIN.replace(flush_lag=10, block_size=32, sink_tokens=32),
    "no smoothing": PLAIN.replace(smooth_k=False, rotate=False),
}


@st.composite
def ragged(draw, most: int = 300) -> tuple[list[int], list[list[int]]]:
    """Lengths of one to three sequences, and for each the ends of its chunks, as many for all."""
    lengths = draw(st.lists(st.sampled_from((0, 1, 3, 7, 63, 64, 65, 127, 130, 193, most)), min_size=1, max_size=3))
    chunks = draw(st.integers(1, 6))
    cut = [draw(st.lists(st.integers(0, n), min_size=chunks - 1, max_size=chunks - 1)) for n in lengths]
    cuts = [[*sorted(places), n] for places, n in zip(cut, lengths, strict=True)]
    return lengths, cuts


def in_chunks(cache: ta.KVCache, k: torch.Tensor, v: torch.Tensor, cuts: list[list[int]]) -> ta.KVCache:
    starts = [0] * len(cuts)
    for ends in zip(*cuts, strict=True):
        append_range(cache, k, v, starts, ends)
        starts = list(ends)
    return cache


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@settings(max_examples=12)
@given(ragged())
def test_chunked_append_is_whole_append(config, drawn):
    lengths, cuts = drawn
    whole, k, v = filled(lengths, config=config)
    pieces = in_chunks(ta.KVCache(len(lengths), 2, 16, config=config), k, v, cuts)
    assert content(pieces) == content(whole)
    for got, want in zip((*pieces.dequantize(), *attend(pieces)), (*whole.dequantize(), *attend(whole)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [(8, torch.float32), (64, torch.bfloat16), (96, torch.float32), (128, torch.float16), (24, torch.float64)],
)
def test_token_by_token_is_whole_append(head_dim, dtype):
    k, v = tokens(1, 2, 140, head_dim, dtype=dtype)
    whole, pieces = (ta.KVCache(1, 2, head_dim, config=PLAIN.replace(bits=3)) for _ in range(2))
    whole.append(k, v)
    for t in range(140):
        pieces.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert content(pieces) == content(whole)


@pytest.mark.parametrize("given_mean", [False, True])
def test_attention_calls_append_as_append_does(given_mean):
    k, v = tokens(2, 2, 200, 16)
    options = {"k_mean": k.mean((0, 2))} if given_mean else {}
    whole, calls = (ta.KVCache(2, 2, 16, config=PLAIN, **options) for _ in range(2))
    whole.append(k, v)
    for start, end in ((0, 70), (70, 71), (71, 199), (199, 200)):
        q = torch.randn(2, 4, end - start, 16)
        ta.turbo_attention_with_kvcache(q, calls, k[:, :, start:end], v[:, :, start:end])
    assert content(calls) == content(whole)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 63))
def test_paper_preset_with_chunks_that_are_whole_blocks(chunks, rest):
    """Its promise: pages are the same. The universal scale is the first append's, so the buffer is not."""
    config = ta.TurboConfig.paper(bits="mixed", low_bit_fraction=0.5)
    ends = [64 * sum(chunks[: i + 1]) for i in range(len(chunks))]
    length = ends[-1] + rest
    k, v = tokens(1, 2, length, 16)
    whole, pieces = (ta.KVCache(1, 2, 16, config=config, head_bits=[[4, 2], [2, 4]]) for _ in range(2))
    whole.append(k, v)
    in_chunks(pieces, k, v, [[*ends, length]])
    assert sequence_content(pieces, 0)["pages"] == sequence_content(whole, 0)["pages"]
    for got, want in zip(pieces.dequantize(), whole.dequantize(), strict=True):
        assert torch.equal(got[:, :, : ends[-1]], want[:, :, : ends[-1]])


@pytest.mark.parametrize("config", [*CONFIGS.values(), ta.TurboConfig.paper()], ids=[*CONFIGS, "paper"])
def test_a_sequence_does_not_depend_on_its_batch(config):
    lengths = [200, 64, 1, 0, 131]
    together, k, v = filled(lengths, config=config)
    for row, length in enumerate(lengths):
        alone = ta.KVCache(1, 2, 16, config=config)
        alone.append(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        assert sequence_content(alone, 0) == sequence_content(together, row)


def test_attention_does_not_depend_on_the_batch():
    lengths = [200, 64, 1, 131]
    together, k, v = filled(lengths)
    out, lse = attend(together)
    q = torch.randn(4, 4, 3, 16)
    out, lse = ta.turbo_attention_with_kvcache(q, together, return_lse=True)
    for row, length in enumerate(lengths):
        alone = ta.KVCache(1, 2, 16, config=PLAIN)
        alone.append(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        got, got_lse = ta.turbo_attention_with_kvcache(q[row : row + 1], alone, return_lse=True)
        # Only the order in which blocks are summed may differ.
        assert torch.allclose(got, out[row : row + 1], rtol=1e-5, atol=1e-6)
        assert torch.allclose(got_lse, lse[row : row + 1], rtol=1e-6, atol=1e-6)


def test_heads_may_be_permuted():
    order = torch.tensor([2, 0, 1])
    k, v = tokens(2, 3, 150, 16)
    bits = torch.tensor([[4, 2, 3], [8, 3, 2]])
    plain = ta.KVCache(2, 3, 16, config=PLAIN, head_bits=bits)
    mixed_up = ta.KVCache(2, 3, 16, config=PLAIN, head_bits=bits[:, order])
    plain.append(k, v)
    mixed_up.append(k[:, order], v[:, order])
    for got, want in zip(mixed_up.dequantize(), plain.dequantize(), strict=True):
        assert torch.equal(got, want[:, order])


def test_strided_and_expanded_inputs():
    k, v = tokens(2, 2, 150, 16)
    plain, strided = ta.KVCache(2, 2, 16, config=PLAIN), ta.KVCache(2, 2, 16, config=PLAIN)
    plain.append(k, v)
    wide = torch.full((2, 150, 2, 48), torch.nan)
    wide[..., 16:32] = k.transpose(1, 2)
    strided.append(wide[..., 16:32].transpose(1, 2), v.transpose(2, 3).contiguous().transpose(2, 3))
    assert content(strided) == content(plain)


def test_the_number_of_threads_changes_nothing():
    k, v = tokens(2, 4, 300, 32)
    q = torch.randn(2, 8, 70, 32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cache = ta.KVCache(2, 4, 32, config=PLAIN)
            cache.append(k[:, :, :230], v[:, :, :230])
            out = ta.turbo_attention_with_kvcache(q, cache, k[:, :, 230:], v[:, :, 230:])
            results.append((content(cache), out))
    finally:
        torch.set_num_threads(before)
    for state, out in results[1:]:
        assert state == results[0][0]
        assert torch.equal(out, results[0][1])
