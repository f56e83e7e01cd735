"""`KVCache`: its properties, empty and odd shapes, and that failures change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import turboattention as ta
from turboattention.validation import check_new

from ..flashq import formulas
from ..helpers import normals
from .tools import PLAIN, attend, content, filled, tokens

ODD = (1, 3, 7, 63, 64, 65, 127, 193)


def test_a_new_cache():
    cache = ta.KVCache(3, 2, 16)
    assert (len(cache), cache.batch_size, cache.num_kv_heads, cache.head_dim) == (0, 3, 2, 16)
    assert cache.seq_lens.tolist() == [0, 0, 0]
    assert cache.seq_lens.dtype == torch.int64
    assert (cache.device, cache.dtype, cache.head_bits, cache.label, cache.window_size) == (None,) * 5
    assert cache.config == ta.TurboConfig()
    assert cache.bits_per_element == math.inf
    assert [x.shape for x in cache.dequantize()] == [(3, 2, 0, 16)] * 2


def test_the_first_tokens_fix_device_and_dtype():
    cache = ta.KVCache(1, 2, 16)
    cache.append(*tokens(1, 2, 3, 16, dtype=torch.bfloat16))
    assert (cache.device, cache.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert cache.dequantize()[0].dtype == torch.bfloat16
    cache.append(*tokens(1, 2, 3, 16))  # another dtype later is another precision of the input, no more
    assert cache.dequantize()[0].dtype == torch.bfloat16


def test_device_and_dtype_may_be_given():
    cache = ta.KVCache(1, 2, 16, device="cpu", dtype=torch.float64)
    assert cache.device == torch.device("cpu")
    cache.append(*tokens(1, 2, 3, 16))
    assert cache.dequantize()[1].dtype == torch.float64


def test_seq_lens_are_a_copy():
    cache, *_ = filled([5, 3])
    cache.seq_lens.zero_()
    assert cache.seq_lens.tolist() == [5, 3]
    assert len(cache) == 5


def test_given_widths_are_there_from_the_start():
    cache = ta.KVCache(1, 2, 16, head_bits=[4, 2])
    assert cache.head_bits.tolist() == [[4, 2], [4, 2]]
    cache.head_bits.fill_(8)
    assert cache.head_bits.tolist() == [[4, 2], [4, 2]]


@pytest.mark.parametrize(
    "config, frozen_at", [(PLAIN, 128), (PLAIN.replace(sink_tokens=0), 64), (PLAIN.replace(flush_lag=10), 138)]
)
def test_widths_are_frozen_at_the_first_full_block_behind_the_sinks(config, frozen_at):
    k, v = tokens(1, 2, frozen_at, 16)
    cache = ta.KVCache(1, 2, 16, config=config.replace(bits=(3, 2)))
    cache.append(k[:, :, :-1], v[:, :, :-1])
    assert cache.head_bits is None
    cache.append(k[:, :, -1:], v[:, :, -1:])
    assert cache.head_bits.tolist() == [[3, 3], [2, 2]]


def test_mixed_widths_are_those_of_the_first_block_before_smoothing_and_rotation():
    k, v = (0.1 * normals(1, 4, 200, 16, seed=s) for s in (1, 2))
    loud = torch.zeros(64, 16)
    loud[0, :8] = 50.0
    k[:, 1, 64:128] += loud  # the first block behind the sink
    k[:, 3, 64:128] += 2 * loud
    v[:, 0, 64:128] += loud
    v[:, 1, 64:128] += loud
    k[:, 0, 128:192] += 9 * loud  # later blocks, and the sink, do not count
    k[:, 2, :64] += 9 * loud
    cache = ta.KVCache(1, 4, 16, config=PLAIN.replace(bits="mixed"))
    cache.append(k, v)
    assert cache.head_bits.tolist() == [[2, 4, 2, 4], [4, 4, 2, 2]]


def test_a_large_constant_offset_does_not_change_mixed_widths():
    """Priorities are of keys before smoothing: the mean that is taken off does not add to a gap."""
    k, v = tokens(1, 4, 130, 16)
    k = k * torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None, None]
    plain, offset = (ta.KVCache(1, 4, 16, config=PLAIN.replace(bits="mixed")) for _ in range(2))
    plain.append(k, v)
    offset.append(k + 40.0, v)
    assert plain.head_bits.tolist()[0] == offset.head_bits.tolist()[0] == [2, 4, 2, 4]


@pytest.mark.parametrize("length", ODD)
@pytest.mark.parametrize("config", [PLAIN, PLAIN.replace(sink_tokens=0, bits=8), ta.TurboConfig.paper(bits=8)], ids=str)
def test_odd_lengths_at_eight_bits_come_back_within_half_a_unit(length, config):
    cache, k, v = filled([length], config=config.replace(bits=8))
    assert len(cache) == length
    for got, want in zip(cache.dequantize(), (k, v), strict=True):
        assert got.shape == want.shape
        # Token scales are at most peak / 112 (a grid step above peak / 119); the paper's universal
        # scale is the whole sequence's. Rotation raises the peak by at most 4, and spreads the error.
        peak = want.abs().amax(-1, keepdim=True) if config.token_scales else want.abs().amax((2, 3), keepdim=True)
        assert bool(((got - want).abs() <= 4 * peak / 112).all())
        if config.token_scales:
            assert float((got - want).norm() / want.norm()) < 0.02


def test_what_it_holds_is_exactly_what_the_formulas_say():
    """One head at 3 bits with search: sink, two compressed blocks and the buffer, in float64."""
    k, v = tokens(1, 1, 200, 16, dtype=torch.float64)
    cache = ta.KVCache(1, 1, 16, config=PLAIN.replace(bits=3))
    cache.append(k, v)
    matrix = formulas.rotation(16)
    keys, values = k[0, 0].numpy() @ matrix, v[0, 0].numpy() @ matrix
    codes, scales = formulas.quantize_rows(keys[:64])
    mean = formulas.bfloat((codes[4:] * scales[4:, None]).mean(0))
    keys[64:] -= mean
    for got, x, offset in zip(cache.dequantize(), (keys, values), (mean, 0.0), strict=True):
        codes, scales = formulas.quantize_rows(x)
        for start in (64, 128):
            codes[start : start + 64] = formulas.restored(codes[start : start + 64], 3, True)
        want = codes * scales[:, None]
        want[64:] += offset
        # `dequantize` computes in float32: sums of 16 numbers of size 10.
        assert np.abs(got[0, 0].numpy() - want @ matrix.T).max() <= 2e-5


def test_a_given_mean_is_added_back():
    k, v = tokens(2, 2, 140, 16)
    cache = ta.KVCache(2, 2, 16, config=PLAIN.replace(bits=8), k_mean=k.mean((0, 2)))
    cache.append(k, v)
    assert float((cache.dequantize()[0] - k).norm() / k.norm()) < 0.01
    assert cache.mean_from == 0


# -- nothing ---------------------------------------------------------------------------------------


def test_zero_new_tokens():
    cache, *_ = filled([70, 3])
    before = content(cache)
    cache.append(torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))
    nothing = torch.full((2, 2, 4, 16), torch.nan)
    cache.append(nothing, nothing, torch.tensor([0, 0]))
    assert content(cache) == before


@pytest.mark.parametrize("config", [PLAIN, ta.TurboConfig.paper()], ids=["default", "paper"])
def test_no_sequences(config):
    cache = ta.KVCache(0, 2, 16, config=config)
    x = torch.zeros(0, 2, 70, 16)
    cache.append(x, x)
    cache.crop(3)
    cache.reorder(torch.zeros(0, dtype=torch.int64))
    assert (len(cache), cache.batch_size, len(cache.clone())) == (0, 0, 0)
    assert [y.shape for y in cache.dequantize()] == [(0, 2, 0, 16)] * 2
    out, lse = ta.turbo_attention_with_kvcache(torch.zeros(0, 4, 5, 16), cache, x, x, return_lse=True)
    assert out.shape == (0, 4, 5, 16)
    assert lse.shape == (0, 4, 5)


def test_all_sequences_can_be_dropped_and_taken_up_again():
    cache, *_ = filled([130, 70])
    cache.reorder(torch.zeros(0, dtype=torch.int64))
    assert cache.batch_size == 0
    assert len(cache) == 0
    assert cache.page_table.pools.compressed.nbytes == cache.page_table.pools.sinks.nbytes == 0


@pytest.mark.parametrize("config", [PLAIN, ta.TurboConfig.paper()], ids=["default", "paper"])
def test_attention_over_an_empty_cache_gives_zero(config):
    cache = ta.KVCache(2, 2, 16, config=config)
    for _ in range(2):
        out, lse = attend(cache)
        assert not bool(out.any())
        assert bool((lse == -torch.inf).all())
        cache.append(torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))


def test_a_device_without_a_number_is_that_of_its_tensors():
    """Tensors name the current GPU by its number; without one it would not equal theirs."""
    with FakeTensorMode():
        cache = ta.KVCache(1, 2, 16, device="cuda")
        k = torch.empty(1, 2, 3, 16, device="cuda")
        assert cache.device == k.device
        check_new((1, 2, 16, 16), cache.device, k, k)
