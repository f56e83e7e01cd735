"""What must not change attention: strides, neighbours in the batch, threads, spans, and options of storage."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.reference.exact import exact_attention

from ..helpers import normals, qkv, relative_error
from .test_attention import outlying


def test_strides_do_not_matter():
    q, k, v = qkv(2, 4, 2, 70, 90, 16)
    want = ta.turbo_attention(q, k, v, is_causal=True)
    wide = torch.full((2, 90, 2, 40), torch.nan)
    wide[..., 8:24] = v.transpose(1, 2)
    got = ta.turbo_attention(
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., 8:24].transpose(1, 2),
        is_causal=True,
    )
    assert torch.equal(got, want)
    one = qkv(1, 2, 1, 5, 9, 8)
    spread = [x.expand(3, -1, -1, -1) for x in one]
    assert torch.equal(ta.turbo_attention(*spread)[2:], ta.turbo_attention(*one))


def test_inputs_are_left_alone():
    tensors = qkv(1, 4, 2, 70, 90, 16)
    before = [x.clone() for x in tensors]
    ta.turbo_attention(*tensors, attn_mask=torch.zeros(70, 90), is_causal=True, softcap=3.0)
    for x, y in zip(tensors, before, strict=True):
        assert torch.equal(x, y)


def test_batch_composition_does_not_matter():
    q, k, v = qkv(3, 4, 2, 70, 150, 32)
    whole, whole_lse = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True)
    for b in range(3):
        got, lse = ta.turbo_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], is_causal=True, return_lse=True)
        # Only the order in which blocks are summed may differ.
        assert torch.allclose(got, whole[b : b + 1], rtol=1e-5, atol=1e-6)
        assert torch.allclose(lse, whole_lse[b : b + 1], rtol=0, atol=1e-5)


def test_head_permutations():
    q, k, v = qkv(1, 6, 3, 20, 90, 16)
    order = torch.tensor([2, 0, 1])
    queries = torch.tensor([4, 5, 0, 1, 2, 3])
    want = ta.turbo_attention(q, k, v, is_causal=True)[:, queries]
    assert torch.equal(ta.turbo_attention(q[:, queries], k[:, order], v[:, order], is_causal=True), want)


def test_query_rows_are_independent():
    """With token scales a row's result is its own (the paper's query tiles share a scale)."""
    q, k, v = qkv(1, 2, 1, 70, 130, 16)
    whole = ta.turbo_attention(q, k, v)
    for i in (0, 1, 64, 69):
        assert torch.allclose(
            ta.turbo_attention(q[:, :, i : i + 1], k, v), whole[:, :, i : i + 1], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_the_number_of_threads_does_not_matter(config):
    q, k, v = qkv(1, 4, 2, 70, 200, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ta.turbo_attention(q, k, v, is_causal=True, config=config, return_lse=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("at_once", [1, 64 * 4 * 70, 2**21])
@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_how_many_blocks_are_held_does_not_matter(at_once, config, monkeypatch):
    q, k, v = qkv(1, 4, 2, 70, 300, 16)
    want = ta.turbo_attention(q, k, v, is_causal=True, config=config)
    monkeypatch.setattr("turboattention.reference.attention._SCORES_AT_ONCE", at_once)
    got = ta.turbo_attention(q, k, v, is_causal=True, config=config)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_smoothing_does_not_show_in_lse():
    """A constant offset of all keys moves lse by scale q . offset, and the output not at all."""
    q, k, v = qkv(1, 2, 2, 20, 150, 16, dtype=torch.float64)
    offset = 5 * normals(16, seed=7, dtype=torch.float64)
    got, lse = ta.turbo_attention(q, k + offset, v, return_lse=True)
    want, want_lse = exact_attention(q, k + offset, v)
    assert relative_error(got, want) < 0.05
    assert float((lse - want_lse).abs().max()) < 0.1
    assert float(want_lse.abs().max()) > 10


def test_options_of_the_configuration_change_results():
    """No field is silently ignored."""
    q, k, v = outlying(*qkv(1, 4, 2, 70, 200, 32))
    base = ta.turbo_attention(q, k, v, is_causal=True)
    for change in (
        {"softmax": "sas"}, {"softmax": "sas2"}, {"softmax": "exp"}, {"softmax": "sas", "sas_threshold": -2.0},
        {"row_max": "running"}, {"p_scale": "tile"},
        {"p_scale": "static"}, {"rescale": "sas"}, {"smooth_k": False}, {"rotate": False}, {"token_scales": False},
        {"block_size": 32},
    ):  # fmt: skip
        got = ta.turbo_attention(q, k, v, is_causal=True, config=ta.TurboConfig(**change))
        assert not torch.equal(got, base), change
        # A running maximum and tile-wide scales cost accuracy here; a wrong formula costs far more.
        assert relative_error(got, exact_attention(q, k, v, is_causal=True)[0]) < 0.35, change


@pytest.mark.parametrize(
    "change",
    [{"bits": 2}, {"search": False}, {"guard": "off"}, {"flush_lag": 7}, {"sink_tokens": 0}, {"stored_prefill": True}],
    ids=str,
)
def test_storage_options_do_not(change):
    """Without a cache there is no stage 2."""
    tensors, config = qkv(1, 4, 2, 70, 200, 32), ta.TurboConfig(softmax="sas")
    got, want = (ta.turbo_attention(*tensors, config=x) for x in (config.replace(**change), config))
    if change == {"stored_prefill": True}:  # weights relative to what each row sees
        assert relative_error(got, want) < 1e-3
    else:
        assert torch.equal(got, want)
