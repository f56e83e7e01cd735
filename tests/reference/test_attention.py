"""Attention without a cache: against an independent model number by number, and against exact attention."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.reference.exact import exact_attention

from ..helpers import bits_of, normals, qkv, relative_error
from . import model

# Errors of INT8 queries, keys, values and weights on normal data: about 0.02 of the output, and 0.05 of the
# normalizer's logarithm. A wrong mask, scale or head costs 0.3 and more.
QUANTIZED, LSE = 0.06, 0.1


def outlying(q, k, v):
    """Offset key channels, a sink, loud value channels: what rotation, smoothing and token scales are for."""
    k[..., 1] += 8.0
    k[:, :, 0] *= 3.0
    v[..., 2] *= 6.0
    v[:, :, 5:6] *= 20.0
    return q, k, v


# -- the formulas, tiny tolerance --------------------------------------------------------------------------

SAS = ta.TurboConfig(softmax="sas", exact_rows=0)


@pytest.mark.parametrize("queries, keys, head_dim", [(3, 3, 8), (5, 70, 16), (130, 130, 8), (4, 200, 24), (70, 65, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_number_by_the_formulas(queries, keys, head_dim, causal):
    q, k, v = outlying(*qkv(1, 2, 1, queries, max(keys, 6), head_dim, dtype=torch.float64))
    k, v = k[:, :, :keys], v[:, :, :keys]
    got, lse = ta.turbo_attention(q, k, v, is_causal=causal, config=SAS, return_lse=True)
    sequence = model.stage1(k[0, 0].numpy(), v[0, 0].numpy())
    for head in range(2):
        for i in range(queries):
            seen = torch.ones(keys, dtype=torch.bool)
            if causal:
                seen = torch.arange(keys) <= keys - queries + i
            want, want_lse = model.attend(q[0, head, i].numpy(), sequence, seen.numpy(), head_dim**-0.5)
            # float64 on both sides; orders of summation differ.
            assert torch.allclose(got[0, head, i], torch.from_numpy(want), rtol=0, atol=1e-9)
            assert float(lse[0, head, i]) == pytest.approx(want_lse, abs=1e-10)


def test_softcap_bias_and_scale_by_the_formulas():
    q, k, v = outlying(*qkv(1, 2, 1, 3, 140, 16, dtype=torch.float64))
    bias = normals(1, 2, 3, 140, dtype=torch.float64)
    got, lse = ta.turbo_attention(q, k, v, attn_mask=bias, softcap=5.0, scale=0.7, config=SAS, return_lse=True)
    sequence = model.stage1(k[0, 0].numpy(), v[0, 0].numpy())
    for head in range(2):
        for i in range(3):
            seen = torch.ones(140, dtype=torch.bool).numpy()
            want, want_lse = model.attend(q[0, head, i].numpy(), sequence, seen, 0.7, 5.0, bias[0, head, i].numpy())
            assert torch.allclose(got[0, head, i], torch.from_numpy(want), rtol=0, atol=1e-9)
            assert float(lse[0, head, i]) == pytest.approx(want_lse, abs=1e-10)


@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_float32_follows_float64(config):
    """Codes may differ by one where a quotient is on a rounding tie; sums by float32's rounding."""
    q, k, v = qkv(2, 4, 2, 100, 170, 32)
    got, lse = ta.turbo_attention(q, k, v, is_causal=True, config=config, return_lse=True)
    want, want_lse = ta.turbo_attention(
        q.double(), k.double(), v.double(), is_causal=True, config=config, return_lse=True
    )
    assert (got.dtype, lse.dtype, want.dtype, want_lse.dtype) == (torch.float32,) * 2 + (torch.float64,) * 2
    assert float((got - want).abs().flatten().median()) < 1e-6
    assert relative_error(got, want) < 1e-3
    assert float((lse - want_lse).abs().median()) < 1e-6
    assert float((lse - want_lse).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    q, k, v = qkv(1, 4, 2, 70, 130, 16, dtype=dtype)
    got, lse = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True)
    want, want_lse = ta.turbo_attention(q.float(), k.float(), v.float(), is_causal=True, return_lse=True)
    assert (got.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(got, want.to(dtype))
    assert torch.equal(bits_of(lse), bits_of(want_lse))


# -- exact attention, quantization's tolerance ------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [ta.TurboConfig(), ta.TurboConfig.paper(), ta.TurboConfig(softmax="exp")], ids=["default", "paper", "exp"]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (6, 1), (8, 2)])
def test_group_ratios(config, causal, heads, kv_heads):
    q, k, v = qkv(2, heads, kv_heads, 90, 150, 32)
    want, want_lse = exact_attention(q, k, v, is_causal=causal)
    got, lse = ta.turbo_attention(q, k, v, is_causal=causal, config=config, return_lse=True)
    assert relative_error(got, want) < QUANTIZED
    for b in range(2):
        for h in range(heads):
            assert relative_error(got[b, h], want[b, h]) < 2 * QUANTIZED
    assert float((lse - want_lse).abs().max()) < LSE


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    q, k, v = qkv(1, 2, 1, 40, 100, head_dim)
    got = ta.turbo_attention(q, k, v, is_causal=True)
    assert relative_error(got, exact_attention(q, k, v, is_causal=True)[0]) < QUANTIZED


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 64), (1, 193), (65, 65), (64, 127), (3, 200), (127, 130)])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_odd_lengths(queries, keys, window, causal):
    q, k, v = qkv(1, 4, 2, queries, keys, 16)
    want, want_lse = exact_attention(q, k, v, is_causal=causal, window_size=window)
    got, lse = ta.turbo_attention(q, k, v, is_causal=causal, window_size=window, return_lse=True)
    assert relative_error(got, want) < QUANTIZED
    assert float((lse - want_lse).abs().max()) < LSE


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_softcap(softcap, config):
    q, k, v = qkv(1, 4, 2, 70, 130, 16)
    q, k = 3 * q, k + 1.0  # smoothing must not change what the cap sees
    want, want_lse = exact_attention(q, k, v, is_causal=True, softcap=softcap)
    got, lse = ta.turbo_attention(q, k, v, is_causal=True, softcap=softcap, config=config, return_lse=True)
    assert relative_error(got, want) < 2 * QUANTIZED  # logits are three times larger
    assert float((lse - want_lse).abs().max()) < 2 * LSE


@pytest.mark.parametrize("scale", [0.05, 0.5, -0.3, 0.0, 1])
def test_scale(scale):
    q, k, v = qkv(1, 2, 2, 20, 90, 16)
    want, want_lse = exact_attention(q, k, v, scale=scale)
    got, lse = ta.turbo_attention(q, k, v, scale=scale, return_lse=True)
    assert relative_error(got, want) < (QUANTIZED if abs(scale) < 1 else 0.15)
    assert float((lse - want_lse).abs().max()) < (LSE if abs(scale) < 1 else 0.2)


MASK_SHAPES = [
    (),
    (1,),
    (90,),
    (70, 1),
    (70, 90),
    (1, 90),
    (1, 1, 70, 90),
    (2, 1, 1, 90),
    (1, 4, 70, 90),
    (4, 1, 1),
    (2, 4, 70, 90),
    (2, 1, 70, 1),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "additive, causal"])
def test_masks_of_all_shapes(shape, kind):
    q, k, v = qkv(2, 4, 2, 70, 90, 16)
    mask = normals(*shape, seed=11)
    mask = mask > -0.5 if kind == "bool" else torch.where(mask > 1.2, -torch.inf, mask)
    causal = kind == "additive, causal"
    full = mask.expand(2, 4, 70, 90)
    want, want_lse = exact_attention(q, k, v, full, causal)
    got, lse = ta.turbo_attention(q, k, v, mask, causal, return_lse=True)
    if bool(want.any()):
        assert relative_error(got, want) < QUANTIZED
    else:
        assert not bool(got.any())
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not bool(got[empty].any())
    assert float((lse - want_lse)[~empty].abs().max() if bool((~empty).any()) else 0) < LSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_may_have_another_dtype(dtype):
    q, k, v = qkv(1, 2, 2, 20, 70, 16)
    mask = normals(20, 70).bfloat16().to(dtype)
    want = ta.turbo_attention(q, k, v, mask.float())
    assert torch.equal(ta.turbo_attention(q, k, v, mask), want)


@pytest.mark.parametrize("queries, keys", [(5, 9), (9, 5), (100, 70), (70, 200), (65, 64), (200, 1)])
def test_causal_is_aligned_to_the_bottom_right(queries, keys):
    q, k, v = qkv(1, 2, 2, queries, keys, 16)
    integers = ta.TurboConfig(exact_rows=0)
    got, lse = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True, config=integers)
    want, _ = exact_attention(q, k, v, is_causal=True)
    blind = max(0, queries - keys)
    assert not bool(got[:, :, :blind].any())
    assert bool((lse[:, :, :blind] == -torch.inf).all())
    assert bool(lse[:, :, blind:].isfinite().all())
    assert relative_error(got, want) < QUANTIZED
    mask = torch.arange(keys) <= keys - queries + torch.arange(queries)[:, None]
    assert torch.allclose(ta.turbo_attention(q, k, v, mask, config=integers), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_rows_with_nothing_to_attend(config):
    q, k, v = qkv(2, 4, 2, 70, 90, 16)
    mask = torch.ones(70, 90, dtype=torch.bool)
    mask[3] = mask[64:66] = False
    got, lse = ta.turbo_attention(q, k, v, mask, config=config, return_lse=True)
    dead = ~mask.any(-1)
    assert not bool(got[:, :, dead].any())
    assert bool((lse[:, :, dead] == -torch.inf).all())
    whole, whole_lse = ta.turbo_attention(q, k, v, config=config, return_lse=True)
    if config.p_scale != "tile":  # the paper's weights share a scale over rows
        assert torch.equal(got[:, :, ~dead], whole[:, :, ~dead])
    assert torch.equal(lse[:, :, ~dead], whole_lse[:, :, ~dead])


@pytest.mark.parametrize("shape", [(0, 2, 5, 9), (2, 2, 0, 9), (2, 2, 5, 0), (1, 2, 0, 0)])
@pytest.mark.parametrize("config", [ta.TurboConfig(), ta.TurboConfig.paper()], ids=["default", "paper"])
def test_empty_dimensions(shape, config):
    batch, heads, queries, keys = shape
    q, k, v = qkv(batch, 2 * heads, heads, queries, keys, 16)
    for causal in (False, True):
        got, lse = ta.turbo_attention(q, k, v, is_causal=causal, config=config, return_lse=True)
        assert got.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert not bool(got.any())
        assert bool((lse == -torch.inf).all())
