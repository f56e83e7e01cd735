"""Attention over a cache: every number by the formulas, and every option against exact attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache
from turboattention.reference.exact import exact_attention

from ..helpers import normals, qkv, relative_error
from . import model

OFF = ta.TurboConfig(guard="off")
EIGHT = OFF.replace(bits=8)


def call(cache, q, k, v, start, end, **options):
    """The call that appends tokens `start` to `end`."""
    new = (x[:, :, start:end] for x in (k, v))
    return ta.turbo_attention_with_kvcache(q[:, :, start:end], cache, *new, **options)


# -- the formulas, tiny tolerance ---------------------------------------------------------------------------


@pytest.mark.parametrize("k_bits, v_bits", [(4, 4), (3, 3), (2, 4), (8, 2)])
def test_prefill_chunks_and_decode_by_the_formulas(k_bits, v_bits):
    """Pages of earlier calls in stored form; the buffer and the call's own tokens as INT8."""
    ends = [70, 71, 135, 200, 201, 260]
    q, k, v = qkv(1, 2, 1, ends[-1], ends[-1], 8, dtype=torch.float64)
    k[..., 1] += 5.0
    v[:, :, 40] *= 8.0
    cache = KVCache(1, 1, 8, config=OFF.replace(softmax="sas", exact_rows=0), head_bits=[[k_bits], [v_bits]])
    sequence = model.stage1(k[0, 0].numpy(), v[0, 0].numpy())
    start = stored = 0
    for end in ends:
        got, lse = call(cache, q, k, v, start, end, return_lse=True)
        model.compress(sequence, max(1, stored), start // 64, k_bits, v_bits)
        stored = start // 64
        for i in range(start, end, 3 if end - start > 10 else 1):
            seen = np.arange(ends[-1]) <= i
            # Tokens after the call's end do not exist yet and must not affect a block's V scale.
            view = model.Sequence(
                *(x[:end] for x in (sequence.k8, sequence.k_scale, sequence.v8, sequence.v_scale)),
                sequence.mean,
                sequence.matrix,
            )
            for head in range(2):
                want, want_lse = model.attend(q[0, head, i].numpy(), view, seen[:end], 8**-0.5)
                # float64 on both sides; orders of summation differ.
                assert torch.allclose(got[0, head, i - start], torch.from_numpy(want), rtol=0, atol=1e-9)
                assert float(lse[0, head, i - start]) == pytest.approx(want_lse, abs=1e-10)
        start = end


def test_decode_reads_integers_not_dequantized_floats():
    """A page's tile times its scale is all attention knows: shuffling pages shuffles nothing else."""
    q, k, v = qkv(1, 2, 1, 1, 300, 8, dtype=torch.float64)
    cache = KVCache(1, 1, 8, config=OFF.replace(bits=3, softmax="sas"))
    cache.append(k, v)
    got, lse = ta.turbo_attention_with_kvcache(q, cache, return_lse=True)
    sequence = model.stage1(k[0, 0].numpy(), v[0, 0].numpy())
    model.compress(sequence, 1, 4, 3, 3)
    for head in range(2):
        want, want_lse = model.attend(q[0, head, 0].numpy(), sequence, np.ones(300, bool), 8**-0.5)
        assert torch.allclose(got[0, head, 0], torch.from_numpy(want), rtol=0, atol=1e-9)
        assert float(lse[0, head, 0]) == pytest.approx(want_lse, abs=1e-10)


# -- prefill through a cache is attention without one -----------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [OFF, OFF.replace(bits=2), OFF.replace(flush_lag=30), ta.TurboConfig.paper()],
    ids=["default", "2 bits", "lag", "paper"],
)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": False}, {"window_size": 50}, {"softcap": 2.0, "scale": 0.4}], ids=str
)
def test_prefill_through_an_empty_cache_is_turbo_attention(config, length, options):
    """To the bit: stage 2 only matters to later calls."""
    q, k, v = qkv(2, 4, 2, length, length, 16)
    options = {"is_causal": True, **options}
    cache = KVCache(2, 2, 16, config=config)
    got, lse = ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, **options)
    want, want_lse = ta.turbo_attention(q, k, v, config=config, return_lse=True, **options)
    assert torch.equal(got, want)
    assert torch.equal(lse, want_lse)
    assert cache.seq_lens.tolist() == [length, length]


def test_prefill_with_a_mask_is_turbo_attention():
    q, k, v = qkv(2, 4, 2, 90, 90, 16)
    mask = normals(2, 1, 90, 90) > -1
    got = ta.turbo_attention_with_kvcache(q, KVCache(2, 2, 16, config=OFF), k, v, attn_mask=mask)
    assert torch.equal(got, ta.turbo_attention(q, k, v, mask, True))


# -- against exact attention, quantization's tolerance ---------------------------------------------------------------

# INT8 everywhere, as without a cache: about 0.02 of the output, and 0.05 of the normalizer's logarithm. A wrong mask,
# position or page costs 0.3 and more.
QUANTIZED, LSE = 0.06, 0.1


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": 30}, {"softcap": 2.0}, {"scale": 0.5}, {"is_causal": False}], ids=str
)
def test_chunked_prefill_and_decode_at_eight_bits(heads, kv_heads, options):
    q, k, v = qkv(2, heads, kv_heads, 240, 240, 16)
    cache = KVCache(2, kv_heads, 16, config=EIGHT)
    options = {"is_causal": True, **options}
    start = 0
    for end in (100, 101, 120, 192, 239, 240):
        got, lse = call(cache, q, k, v, start, end, return_lse=True, **options)
        want, want_lse = exact_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **options)
        assert relative_error(got, want) < QUANTIZED * (2 if "scale" in options else 1)
        assert float((lse - want_lse).abs().max()) < LSE * (2 if "scale" in options else 1)
        start = end


@pytest.mark.parametrize("bits, bound", [(8, 0.06), (4, 0.25), (3, 0.5), (2, 0.9)])
def test_decode_after_prefill_is_close_at_every_width(bits, bound):
    """Quantization error grows with fewer bits, and stays below what is expected of clean data."""
    q, k, v = qkv(1, 8, 4, 1, 500, 64)
    cache = KVCache(1, 4, 64, config=OFF.replace(bits=bits))
    cache.append(k, v)
    error = relative_error(ta.turbo_attention_with_kvcache(q, cache), exact_attention(q, k, v)[0])
    assert error < bound
    assert error > {8: 0.0, 4: 0.05, 3: 0.12, 2: 0.25}[bits]  # the width is really used


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dims_and_dtypes(head_dim, dtype):
    q, k, v = qkv(1, 2, 1, 70, 140, head_dim, dtype=dtype)
    cache = KVCache(1, 1, head_dim, config=EIGHT)
    cache.append(k[:, :, :70], v[:, :, :70])
    got, lse = ta.turbo_attention_with_kvcache(q, cache, k[:, :, 70:], v[:, :, 70:], return_lse=True)
    assert (got.dtype, lse.dtype) == (dtype, torch.float32)
    assert relative_error(got, exact_attention(q, k, v, is_causal=True)[0]) < QUANTIZED


@pytest.mark.parametrize("shape", [(200,), (3, 1), (3, 200), (2, 1, 1, 200), (1, 4, 3, 200), (2, 4, 3, 200)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_over_old_and_new_tokens(shape, additive, causal):
    q, k, v = qkv(2, 4, 2, 3, 200, 16)
    mask = normals(*shape, seed=3)
    mask = torch.where(mask > 1.2, -torch.inf, mask) if additive else mask > -0.5
    cache = KVCache(2, 2, 16, config=EIGHT)
    cache.append(k[:, :, :197], v[:, :, :197])
    got, lse = ta.turbo_attention_with_kvcache(
        q, cache, k[:, :, 197:], v[:, :, 197:], attn_mask=mask, is_causal=causal, return_lse=True
    )
    want, want_lse = exact_attention(q, k, v, mask.expand(2, 4, 3, 200), causal)
    assert relative_error(got, want) < QUANTIZED
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert float((lse - want_lse)[~empty].abs().max()) < LSE


def poisoned(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    x = x.clone()
    for row, length in enumerate(lengths):
        x[row, :, length:] = torch.nan if row % 2 else torch.inf
    return x


@pytest.mark.parametrize("config", [EIGHT, ta.TurboConfig.paper(bits=8)], ids=["default", "paper"])
@pytest.mark.parametrize("options", [{}, {"window_size": 20}, {"is_causal": False}], ids=str)
def test_ragged_batches(config, options):
    """Left-aligned tokens with NaN and infinity behind them, in q too; each sequence on its own."""
    q, k, v = qkv(4, 4, 2, 300, 300, 16)
    cache = KVCache(4, 2, 16, config=config)
    done = [0, 0, 0, 0]
    options = {"is_causal": True, **options}
    for counts in ([100, 64, 3, 0], [1, 1, 1, 1], [0, 70, 30, 128], [5, 0, 40, 1]):
        longest = max(counts)
        part = [torch.stack([x[b, :, done[b] : done[b] + longest] for b in range(4)]) for x in (q, k, v)]
        part = [poisoned(x, counts) for x in part]
        got, lse = ta.turbo_attention_with_kvcache(
            part[0], cache, *part[1:], lengths=torch.tensor(counts), return_lse=True, **options
        )
        assert got.shape == part[0].shape
        for b, count in enumerate(counts):
            assert not bool(got[b, :, count:].any())
            assert bool((lse[b, :, count:] == -torch.inf).all())
            if count:
                end = done[b] + count
                want, want_lse = exact_attention(
                    q[b : b + 1, :, done[b] : end], k[b : b + 1, :, :end], v[b : b + 1, :, :end], **options
                )
                # The paper's universal scales are those of the first call alone: clamped later.
                assert relative_error(got[b, :, :count], want[0]) < (QUANTIZED if config is EIGHT else 0.3)
                assert float((lse[b, :, :count] - want_lse[0]).abs().max()) < (LSE if config is EIGHT else 0.5)
            done[b] += count
    assert cache.seq_lens.tolist() == done


def test_ragged_rows_are_what_each_sequence_gives_alone():
    q, k, v = qkv(3, 4, 2, 90, 90, 16)
    lengths = [90, 64, 7]
    together = KVCache(3, 2, 16, config=OFF)
    got = ta.turbo_attention_with_kvcache(
        *(poisoned(x, lengths) for x in (q,)),
        together,
        *(poisoned(x, lengths) for x in (k, v)),
        lengths=torch.tensor(lengths),
    )
    for b, length in enumerate(lengths):
        alone = KVCache(1, 2, 16, config=OFF)
        want = ta.turbo_attention_with_kvcache(
            *(x[b : b + 1, :, :length] for x in (q,)), alone, *(x[b : b + 1, :, :length] for x in (k, v))
        )
        # Only the order in which blocks are summed may differ.
        assert torch.allclose(got[b, :, :length], want[0], rtol=1e-5, atol=1e-6)


def test_without_new_tokens_queries_stand_at_each_sequence_s_end():
    q, k, v = qkv(2, 4, 2, 5, 150, 16)
    lengths = torch.tensor([150, 3])
    cache = KVCache(2, 2, 16, config=EIGHT)
    cache.append(k, v, lengths)
    before = cache.seq_lens
    got, lse = ta.turbo_attention_with_kvcache(q, cache, return_lse=True)
    want, _ = exact_attention(q, k, v, is_causal=True, lengths=lengths)
    assert relative_error(got, want) < QUANTIZED
    assert not bool(got[1, :, :2].any())  # five queries over three tokens: two are before all of them
    assert bool((lse[1, :, :2] == -torch.inf).all())
    assert torch.equal(cache.seq_lens, before)


@pytest.mark.parametrize("rows, new", [(1, 4), (7, 4)])
def test_more_or_fewer_queries_than_new_tokens(rows, new):
    """Without lengths, the last query is at the last token."""
    q, k, v = qkv(1, 4, 2, rows, 100, 16)
    cache = KVCache(1, 2, 16, config=EIGHT)
    cache.append(k[:, :, :-new], v[:, :, :-new])
    got = ta.turbo_attention_with_kvcache(q, cache, k[:, :, -new:], v[:, :, -new:])
    assert relative_error(got, exact_attention(q, k, v, is_causal=True)[0]) < QUANTIZED
    assert len(cache) == 100


def test_a_given_mean_does_not_change_results_beyond_quantization():
    q, k, v = qkv(1, 4, 2, 150, 150, 16)
    k = k + 5 * normals(16, seed=8)
    cache = KVCache(1, 2, 16, config=EIGHT, k_mean=k.mean((0, 2)))
    call(cache, q, k, v, 0, 100)
    got, lse = call(cache, q, k, v, 100, 150, return_lse=True, softcap=20.0)
    want, want_lse = exact_attention(q[:, :, 100:], k, v, is_causal=True, softcap=20.0)
    assert relative_error(got, want) < 2 * QUANTIZED
    assert float((lse - want_lse).abs().max()) < LSE


def test_a_decode_step_over_eight_bits_is_close_to_prefill():
    """The same row, once among all others without a cache and once alone over pages."""
    q, k, v = qkv(1, 8, 2, 200, 200, 64)
    cache = KVCache(1, 2, 64, config=EIGHT)
    cache.append(k, v)
    got, lse = ta.turbo_attention_with_kvcache(q[:, :, -1:], cache, return_lse=True)
    want, want_lse = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True)
    # 8-bit pages hold the very INT8 values that prefill attends: only sums differ.
    assert torch.allclose(got, want[:, :, -1:], rtol=1e-5, atol=1e-6)
    assert torch.allclose(lse, want_lse[:, :, -1:], rtol=0, atol=1e-5)
