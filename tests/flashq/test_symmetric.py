"""Stage 1: codes and scales bit for bit, by tile and by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import DtypeError, ShapeError
from turboattention.flashq import dequantize_int8, quantize_int8, quantize_tokens

from ..helpers import normals
from . import formulas

SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def numpy_tiles(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Stage 1 of one head [L, D] in the dtype of x, tile by tile."""
    codes, scales = [], []
    for start in range(0, len(x), size):
        tile = x[start : start + size]
        peak = np.abs(tile).max()
        scale = peak / x.dtype.type(119) if peak > 0 else x.dtype.type(1)
        codes.append(np.rint(tile / scale))
        scales.append(scale)
    return np.concatenate(codes).astype(np.int8), np.array(scales)


def test_hand_computed_codes_round_half_to_even():
    x = torch.tensor([[119.0, 0.5, 1.5, 2.5], [-0.5, -1.5, -2.5, 3.4999]]).view(1, 1, 2, 4)
    codes, scales = quantize_int8(x)
    assert scales.tolist() == [[[1.0]]]
    assert codes.tolist() == [[[[119, 0, 2, 2], [0, -2, -2, 3]]]]


def test_hand_computed_scales():
    x = torch.tensor([[0.0, -238.0], [59.5, 4.0]]).view(1, 1, 2, 2)
    codes, scales = quantize_int8(x, block_size=1)
    assert scales.tolist() == [[[2.0, 0.5]]]
    assert codes.tolist() == [[[[0, -119], [119, 8]]]]


@pytest.mark.parametrize("length", [1, 3, 7, 63, 64, 65, 127, 193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_exact_against_numpy(length, dtype):
    x = normals(2, 3, length, 24, dtype=dtype) * torch.logspace(-3, 3, length, dtype=dtype)[:, None]
    codes, scales = quantize_int8(x)
    assert codes.dtype == torch.int8
    assert scales.dtype == dtype
    assert scales.shape == (2, 3, math.ceil(length / 64))
    for b in range(2):
        for h in range(3):
            want_codes, want_scales = numpy_tiles(x[b, h].numpy(), 64)
            assert np.array_equal(codes[b, h].numpy(), want_codes)
            assert np.array_equal(scales[b, h].numpy(), want_scales)


def test_division_is_true_division():
    # 119 values for which x * (1 / s) rounds to another code than x / s in float32.
    peak = torch.tensor(1.2345678)
    halves = (torch.arange(119) + 0.5) * (peak / 119)
    x = torch.cat((peak[None], halves)).view(1, 1, 1, 120)
    scale = (peak / 119).numpy()
    by_reciprocal = np.rint(x.numpy() * (np.float32(1) / scale))
    by_division = np.rint(x.numpy() / scale)
    assert (by_reciprocal != by_division).any()
    assert np.array_equal(quantize_int8(x)[0].numpy(), by_division)


def test_partial_last_tile_is_scaled_by_its_own_rows():
    x = torch.full((1, 1, 66, 2), 119.0)
    x[:, :, 64:] = 1.19
    codes, scales = quantize_int8(x)
    assert scales[0, 0, 0] == 1.0
    assert scales[0, 0, 1] == torch.tensor(1.19) / 119
    assert bool((codes == 119).all())


def test_all_zero_tile_has_scale_one():
    x = torch.zeros(1, 2, 65, 8)
    x[0, 1, 64] = 2.38
    codes, scales = quantize_int8(x)
    assert scales.tolist()[0][0] == [1.0, 1.0]
    assert scales[0, 1, 0] == 1.0
    assert scales[0, 1, 1] == torch.tensor(2.38) / 119
    assert int(codes.abs().sum()) == 8 * 119


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_are_taken_as_float32(dtype):
    x = normals(1, 2, 70, 16).to(dtype)
    codes, scales = quantize_int8(x)
    want_codes, want_scales = quantize_int8(x.float())
    assert scales.dtype == torch.float32
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)


def test_heads_and_sequences_do_not_share_scales():
    x = normals(2, 2, 64, 8) * torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(2, 2, 1, 1)
    scales = quantize_int8(x)[1].flatten()
    assert torch.equal(scales, x.abs().amax((2, 3)).flatten() / 119)
    assert len(set(scales.tolist())) == 4


@given(st.lists(SINGLE, min_size=1, max_size=12))
def test_codes_stay_within_119_and_near_their_values(values):
    x = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)
    codes, scales = quantize_int8(x)
    assert int(codes.to(torch.int16).abs().max()) <= 119
    assert bool(scales.isfinite().all())
    # Half a unit, and the division's own rounding: 119 units of 2^-24 at most.
    error = (dequantize_int8(codes, scales.double()) - x.double()).abs() / scales.double()
    assert float(error.max()) <= 0.5 + 119 * 2**-24


def test_dequantize_is_code_times_tile_scale():
    codes = torch.tensor([[1, -2], [3, 4], [-5, 119]], dtype=torch.int8).view(1, 1, 3, 2)
    scales = torch.tensor([[[0.5, 2.0]]])
    assert dequantize_int8(codes, scales, block_size=2).tolist() == [[[[0.5, -1.0], [1.5, 2.0], [-10.0, 238.0]]]]


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (1, 1, 3, 0)])
def test_empty_tensors(shape):
    codes, scales = quantize_int8(torch.zeros(shape))
    assert codes.shape == shape
    assert scales.shape == (*shape[:2], math.ceil(shape[2] / 64))


@pytest.mark.parametrize(
    "x, size, error, message",
    [
        (
            torch.zeros(2, 3, 4),
            64,
            ShapeError,
            r"^x: expected \[batch, heads, tokens, head_dim\], got shape \(2, 3, 4\)$",
        ),
        (torch.zeros(1, 1, 2, 8), 0, ShapeError, r"^block_size: expected at least 1, got 0$"),
        (
            torch.zeros(1, 1, 2, 8, dtype=torch.int8),
            64,
            DtypeError,
            r"^x: expected a floating-point tensor, got torch.int8$",
        ),
    ],
)
def test_refusals(x, size, error, message):
    with pytest.raises(error, match=message):
        quantize_int8(x, size)


# -- by token -----------------------------------------------------------------------------------


def test_token_scales_by_hand():
    x = torch.tensor([[119.0, 0.5], [120.0, -1.6], [0.0, 0.0], [-126.5, 1.0]])
    codes, scales = quantize_tokens(x)
    # 120 / 119 goes up to 1 + 1/16; 126.5 / 119 = 1.06303 to 1 + 2/16; a zero row has 1.
    assert scales.tolist() == [1.0, 1.0625, 1.0, 1.125]
    assert codes.tolist() == [[119, 0], [113, -2], [0, 0], [-112, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_codes_and_scales_are_exact(dtype):
    x = normals(200, 24, dtype=dtype) * torch.logspace(-8, 8, 200, dtype=dtype)[:, None]
    codes, scales = quantize_tokens(x)
    # In float32 the grid is found from the float32 quotient; give the model the same one.
    quotients = x.abs().amax(-1) / 119
    want = [formulas.grid_up(float(s)) for s in quotients]
    assert scales.dtype == dtype
    assert scales.tolist() == want
    assert np.array_equal(codes.numpy(), np.rint(x.numpy() / np.array(want, x.numpy().dtype)[:, None]))


@given(st.lists(SINGLE, min_size=1, max_size=8), st.booleans())
def test_any_token_stays_within_119_on_the_grid(values, double):
    x = torch.tensor([values], dtype=torch.float64 if double else torch.float32)
    codes, scale = quantize_tokens(x)
    peak = float(x.abs().max())
    assert int(codes.to(torch.int16).abs().max()) <= 119
    assert scale.dtype == x.dtype
    assert float(scale) == formulas.grid_up(float(x.abs().max() / 119))
    assert torch.equal(scale.to(torch.bfloat16).to(x.dtype), scale)
    if peak > 2.0**-92:
        # Up by less than one of 16 steps between powers of two (and float32's own rounding).
        assert peak / 119 <= float(scale) * (1 + 2**-23)
        assert float(scale) < peak / 119 * (1 + 1 / 16)


@given(st.floats(min_value=1e-37, max_value=1e38))
def test_float64_between_two_floats_is_rounded_up(value):
    # As float32 the quotient may round down onto the grid; codes of 120 would follow.
    _, scale = quantize_tokens(torch.tensor([[value]], dtype=torch.float64))
    assert float(scale) == formulas.grid_up(value / 119)
    assert float(scale) >= min(value / 119, 2.0**127)


def test_a_float64_just_above_the_grid():
    """As float32 its quotient is 1, which is on the grid, but below it."""
    _, scale = quantize_tokens(torch.tensor([[119 * (1 + 1e-10)]], dtype=torch.float64))
    assert float(scale) == 1.0625


@pytest.mark.parametrize("value", [2.0**-149, 1e-40, 2.0**-110, 3.4e38, -3.4e38])
def test_extreme_magnitudes(value):
    codes, scales = quantize_tokens(torch.tensor([[value, 0.0]]))
    assert bool(scales.isfinite().all())
    assert float(scales) >= 2.0**-100
    assert abs(int(codes[0, 0])) == (0 if abs(value) < 2.0**-101 else round(abs(value) / float(scales)))


def test_rows_are_independent_of_their_neighbours():
    x = normals(3, 2, 65, 40)
    codes, scales = quantize_tokens(x)
    for row in (0, 1, 31, 64):
        one_codes, one_scales = quantize_tokens(x[:, :, row : row + 1])
        assert torch.equal(one_codes, codes[:, :, row : row + 1])
        assert torch.equal(one_scales, scales[:, :, row : row + 1])


def test_integers_are_refused():
    with pytest.raises(DtypeError, match=r"^x: expected a floating-point tensor, got torch.int32$"):
        quantize_tokens(torch.zeros(2, 8, dtype=torch.int32))
