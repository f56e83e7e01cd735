"""The study of SAS: the functions behind its figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from turboattention.softmax import SAS_COEFFICIENTS, sas

from ..scripts import benchmark_script

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with benchmark_script("sas.py") as module:
        yield module


def test_its_exponential_is_sas(study):
    x = np.linspace(-9, 0, 500)
    ours = study.approximation(np.e, np.array(SAS_COEFFICIENTS), -6.0)(x)
    assert np.allclose(ours, sas(torch.from_numpy(x)).numpy(), atol=1e-12)


@pytest.mark.parametrize("base", [np.e, 2.0])
def test_each_degree_errs_less(study, base):
    errors = [study.largest_error(base, study.fit(base, degree)) for degree in study.DEGREES]
    assert all(low < high / 8 for high, low in itertools.pairwise(errors))
    x = -np.linspace(0, 20, 3000)
    found = np.abs(study.approximation(base, study.fit(base, 3))(x) / np.exp(x) - 1).max()
    assert found == pytest.approx(study.largest_error(base, study.fit(base, 3)), rel=0.05)


@pytest.mark.parametrize("row_max", ["block", "running"])
def test_the_exact_exponential_has_no_error(study, row_max):
    x = study.last_rows("gauss")
    assert study.output_error(*x, np.exp, row_max, quantized=False) < 1e-12
    assert 1e-3 < study.output_error(*x, np.exp, row_max, quantized=True) < 0.1


def test_what_the_page_concludes(study):
    """A running maximum loses what lies below one token that dominates; below -6 nothing is lost to INT8 weights."""
    x = study.long_context(2048)
    errors = {
        (row_max, threshold): study.output_error(
            *x, study.approximation(np.e, np.array(SAS_COEFFICIENTS), threshold), row_max, quantized=True
        )
        for row_max in ("block", "running")
        for threshold in (-4.0, -6.0, -12.0)
    }
    assert errors["running", -6.0] > 20 * errors["block", -6.0]
    assert errors["block", -6.0] == pytest.approx(errors["block", -12.0], rel=0.02)
    assert errors["block", -4.0] > errors["block", -6.0]


@pytest.mark.parametrize("name", ["polynomials", "thresholds", "maxima"])
def test_the_page_has_its_tables_and_plots(study, name):
    mark = study.MARK.replace("sas.py", f"sas.py: {name}")
    parts = study.PAGE.read_text(encoding="utf-8").split(mark)
    assert len(parts) == 3
    assert parts[1].count("\n|") > 5
    assert (ROOT / "docs" / f"sas-{name}.png").is_file()
    assert f"(sas-{name}.png)" in parts[1]
