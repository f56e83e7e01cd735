"""The softmax in 16-bit integers: every number by its formula in plain Python, and how far it is from the exact one."""

from __future__ import annotations

import math

import pytest
import torch

import turboattention as ta
from turboattention.reference.fixed_point import FixedWeights, fixed_values, fixed_weights, product_shift

from ..helpers import normals, relative_error
from .test_attention import exact_attention, qkv

INT16 = range(-(1 << 15), 1 << 15)
UINT16 = range(1 << 16)


def product(x: int, y: int) -> int:
    """x y / 2^15, rounded, of numbers of 16 bits with sign."""
    assert x in INT16
    assert y in INT16
    out = (x * y + (1 << 14)) >> 15
    assert out in INT16
    return out


def weight(difference: int, slope: float) -> int:
    """Of a score that is `difference` below the largest; slope: 2048ths of an octave per unit."""
    slope = min(slope, 8191.0)
    steps = max(0, math.floor(math.log2(slope)) + 1) if slope else 0
    factor = min(65535, round(slope * 2.0 ** (16 - steps)))
    most = min(65535 >> steps, int(min(15 * 2048 / max(slope, 1e-30), 65535.0)) + 1)
    near = min(difference, most) << steps
    assert near in UINT16
    y = near * factor >> 16
    f = (y << 5) & 0xFFFF
    inner = 7570 - (1294 * f >> 16)
    slope_of_cubic = 22660 - (inner * f >> 16)
    return 32767 - (slope_of_cubic * f >> 16) >> (y >> 11)


def row(products, unit, shift, k_scale, v_scale, seen, by_row):
    """One query row over one block: weights, the largest logit, the sum of weights, codes and what they count."""
    top_k, top_v = max(k_scale), max(v_scale)
    keys = [round(s / (top_k or 1.0) * 32767) for s in k_scale]
    values = [round(s / (top_v or 1.0) * 32767) for s in v_scale]
    logit = unit * top_k * 2.0**shift * (32768 / 32767)
    scores = [product(p >> shift, key) for p, key in zip(products, keys, strict=True)]
    top = max((s for s, x in zip(scores, seen, strict=True) if x), default=None)
    if top is None:
        return [0] * len(seen), -math.inf, 0.0, [0] * len(seen), 0.0
    slope = logit * math.log2(math.e) * 2048
    weights = [weight(top - s, slope) if x else 0 for s, x in zip(scores, seen, strict=True)]
    row_sum = sum(product(w, 2048) for w in weights) / 2048
    products = [product(w, v) for w, v in zip(weights, values, strict=True)]
    levels, unit = 127, top_v / 127
    if by_row:
        levels = int(min(127 * 32768 / max(max(products), 1), 32767))
        unit = top_v * (32768 / 32767) ** 2 / levels
    codes = [product(p, levels) for p in products]
    assert max(codes) <= 127
    return weights, (top + (0.5 if shift else 0.0)) * logit, row_sum, codes, unit


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 1.0, 30.0, 1e4])
def test_every_number_by_the_formulas(size, by_row):
    """From logits that hardly differ to some that no INT8 product tells apart."""
    rows, tokens, channels = 5, 64, 32
    codes = (normals(1, 1, 1, rows, channels, seed=1, dtype=torch.float64) * 45).round().clamp(-119, 119)
    keys = (normals(1, 1, 1, tokens, channels, seed=2, dtype=torch.float64) * 45).round().clamp(-127, 127)
    codes[..., 4, :], keys[..., 7, :] = 119.0, -127.0
    k_scale, v_scale = (normals(1, 1, 1, tokens, seed=s, dtype=torch.float64).abs() for s in (3, 4))
    k_scale[..., 9] = v_scale[..., 11] = 0.0
    unit = torch.full((1, 1, 1, 1, rows), size * 1e-4, dtype=torch.float64)
    seen = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0)) < 0.8
    seen[2], seen[3] = False, True
    products = codes @ keys.transpose(-1, -2)
    shift = product_shift(codes)
    mean = torch.full_like(unit, 0.25)
    found = fixed_weights(
        products[:, :, :, None], unit, shift[:, :, :, None], mean, k_scale, seen[None, None, None, None]
    )
    v8 = (normals(1, 1, 1, tokens, 8, seed=5, dtype=torch.float64) * 45).round()
    row_sum, out = fixed_values(found, v8, v_scale, by_row)
    for r in range(rows):
        weights, row_max, total, values, value_unit = row(
            products[0, 0, 0, r].int().tolist(), float(unit[0, 0, 0, 0, r]), int(shift[0, 0, 0, r]),
            k_scale.flatten().tolist(), v_scale.flatten().tolist(), seen[r].tolist(), by_row,
        )  # fmt: skip
        assert found.weights[0, 0, 0, 0, r].tolist() == weights
        assert float(found.row_max[0, 0, 0, 0, r]) == pytest.approx(row_max + 0.25, rel=1e-12)
        assert float(row_sum[0, 0, 0, 0, r]) == total
        want = torch.tensor(values, dtype=torch.float64) @ v8[0, 0, 0] * value_unit
        assert torch.allclose(out[0, 0, 0, 0, r], want, rtol=1e-12, atol=0)


def test_a_lone_key_gives_its_value():
    """Exactly, or with the rounding of its code where that has a scale per row."""
    found = FixedWeights(torch.tensor([32767] + [0] * 63).view(1, 1, 1, 1, 1, 64), torch.zeros(1))
    v8, v_scale = (
        torch.full((1, 1, 1, 64, 8), 100.0, dtype=torch.float64),
        torch.full((1, 1, 1, 64), 0.3, dtype=torch.float64),
    )
    for by_row, bound in ((True, 1e-4), (False, 1e-12)):
        row_sum, out = fixed_values(found, v8, v_scale, by_row)
        assert float(row_sum) == 1.0
        assert torch.allclose(out, torch.full_like(out, 30.0), rtol=bound, atol=0)


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("head_dim", [8, 64, 256])
def test_it_adds_little_to_the_error_of_int8(size, head_dim):
    q, k, v = qkv(1, 2, 1, 40, 300, head_dim)
    want, want_lse = exact_attention(q * size, k, v)
    errors = {}
    for softmax in ("exp", "sas16"):
        config = ta.TurboConfig(softmax=softmax)
        out, lse = ta.turbo_attention(q * size, k, v, config=config, backend="reference", return_lse=True)
        errors[softmax] = relative_error(out, want), float((lse - want_lse).abs().mean())
    assert errors["sas16"][0] <= 1.03 * errors["exp"][0] + 3e-4
    assert errors["sas16"][1] <= 1.03 * errors["exp"][1] + 3e-4
