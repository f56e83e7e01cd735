"""SAS: error bounds, exact points, the threshold, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import turboattention as ta
from turboattention.config import TurboConfig
from turboattention.errors import DtypeError
from turboattention.softmax import SAS2_ERROR, SAS16_OCTAVE, SAS16_ONE, exponential, sas, sas2, sas16, sas16_power


def line(start: float, stop: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Many points of an interval, both ends included."""
    return torch.linspace(start, stop, 200_001, dtype=torch.float64).to(dtype)


def by_formula(x: float) -> float:
    n = math.floor(-x)
    f = -x - n
    return math.exp(-n) * (-0.1025 * f**3 + 0.4626 * f**2 - 0.9922 * f + 0.9996)


def test_the_paper_s_polynomial_and_table():
    x = line(-6, 0)
    want = np.array([by_formula(v) for v in x.tolist()])
    # Two orders of evaluating one cubic in float64.
    assert np.abs(sas(x).numpy() - want).max() <= 1e-15


def test_error_above_the_threshold():
    x = line(-6, 0)
    error = float((sas(x) - x.exp()).abs().max())
    assert 3.9e-4 <= error <= 4.0e-4  # 4.0e-4 at 0, where the polynomial gives 0.9996


def test_error_with_the_threshold():
    x = line(-30, 0)
    error = float((sas(x) - x.exp()).abs().max())
    assert 2.4e-3 <= error <= 2.5e-3  # e^-6, which becomes zero


def test_exact_points():
    assert float(sas(torch.zeros((), dtype=torch.float64))) == 0.9996
    whole = -torch.arange(7, dtype=torch.float64)
    assert sas(whole).tolist() == [math.exp(-n) * 0.9996 for n in range(7)]


def test_threshold_is_inclusive():
    x = torch.tensor([-6.0, math.nextafter(-6, -7), -100.0, -math.inf], dtype=torch.float64)
    assert sas(x).tolist() == [math.exp(-6) * 0.9996, 0.0, 0.0, 0.0]
    assert sas2(x)[0] > 0
    assert sas2(x)[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("threshold", [-0.25, -1.0, -5.5, -12.0, -80.0])
@pytest.mark.parametrize("form", [sas, sas2])
def test_other_thresholds(form, threshold):
    x = line(2 * threshold, 0)
    got = form(x, threshold)
    assert bool((got[x < threshold] == 0).all())
    kept = x >= threshold
    assert bool((got[kept] > 0).all())
    assert float((got - x.exp())[kept].abs().max()) <= 4.0e-4


@pytest.mark.parametrize("form", [sas, sas2])
def test_minus_infinity_gives_zero(form):
    x = torch.full((3, 2), -math.inf)
    assert form(x).tolist() == [[0.0, 0.0]] * 3
    assert form(x, -80.0).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("form", [sas, sas2])
def test_float32_follows_float64(form):
    x = line(-6, 0, torch.float32)
    got = form(x)
    assert got.dtype == torch.float32
    # A few roundings of numbers up to 1.
    assert float((got.double() - form(x.double())).abs().max()) <= 5e-7


@pytest.mark.parametrize("form", [sas, sas2])
def test_shapes_strides_and_input_are_kept(form):
    x = -torch.rand(4, 6).T
    before = x.clone()
    got = form(x)
    assert got.shape == (6, 4)
    assert torch.equal(x, before)
    assert torch.equal(got, form(before.contiguous()))
    assert form(torch.zeros(0, 3)).shape == (0, 3)


def test_base_two_form_keeps_its_relative_bound():
    x = line(-80, 0)
    relative = (sas2(x, -80.0) / x.exp() - 1).abs()
    assert 0.9 * SAS2_ERROR <= float(relative.max()) <= SAS2_ERROR


def test_base_two_form_is_exact_at_powers_of_two():
    assert float(sas2(torch.zeros(()))) == 1.0
    whole = torch.arange(1, 8, dtype=torch.float64) * -math.log(2)
    # n or n - 1e-16 below the next power: either side gives the power of two, but for rounding.
    assert torch.allclose(sas2(whole), torch.exp2(-torch.arange(1, 8, dtype=torch.float64)), rtol=1e-14, atol=0)


def test_base_two_form_is_continuous():
    for n in range(1, 8):
        below, above = (torch.tensor(-n * math.log(2) + d, dtype=torch.float64) for d in (-1e-9, 1e-9))
        assert abs(float(sas2(below) - sas2(above))) <= 3e-9  # the slope is at most 1


@pytest.mark.parametrize("form", [sas, sas2, sas16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_are_refused(form, dtype):
    with pytest.raises(DtypeError, match=rf"^x: expected float32 or float64, got {dtype}$"):
        form(torch.zeros(2, dtype=dtype))


def test_public_name():
    assert ta.sas is sas


@pytest.mark.parametrize("name, form", [("sas", sas), ("sas2", sas2)])
def test_the_configuration_names_form_and_threshold(name, form):
    x = line(-20, 0, torch.float32)
    assert torch.equal(exponential(name, -6.0)(x), form(x, -6.0))
    assert torch.equal(exponential(name, -9.0)(x), form(x, -9.0))


def test_exact_exponential_has_no_threshold():
    x = line(-20, 0, torch.float32)
    assert torch.equal(exponential("exp", -6.0)(x), x.exp())


@pytest.mark.parametrize(
    "device, stored, name", [("cpu", False, "sas16"), ("cpu", True, "sas"), ("cuda", False, "exp")]
)
def test_what_auto_means(device, stored, name):
    assert TurboConfig(stored_prefill=stored).softmax_on(torch.device(device)) == name


def test_the_form_in_integers_over_all_its_distances():
    distance = torch.arange(65536, dtype=torch.int32)
    exact = torch.exp2(-distance.double() / SAS16_OCTAVE)
    weight = sas16_power(distance)
    assert (int(weight[0]), int(weight.min())) == (SAS16_ONE, 0)
    assert bool((weight[1:] <= weight[:-1]).all())
    # A cubic of 16-bit products, then what a shift cuts off.
    assert float((weight / SAS16_ONE - exact).abs().max()) <= 1.6e-4
    assert not bool(weight[15 * SAS16_OCTAVE :].any())
    assert bool((weight[: 14 * SAS16_OCTAVE] > 0).all())


def test_the_form_in_integers_is_close_to_the_exponential():
    x = line(-40, 0, torch.float64)
    assert float((sas16(x) - x.exp()).abs().max()) <= 3e-4
    assert float(sas16(torch.zeros(1))) == 1.0
    assert float(sas16(torch.full((1,), -torch.inf))) == 0.0
