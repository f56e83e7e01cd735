from __future__ import annotations

import numpy as np
import pytest

from turboattention.evaluation.intervals import bootstrap, mcnemar, share


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_share_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    got = share(right, total)
    assert got["value"] == right / total
    assert (got["low"], got["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_share_of_all_ends_at_one_and_has_a_width() -> None:
    got = share(10, 10)
    assert got["high"] == 1.0
    assert got["low"] == pytest.approx(1 / (1 + 1.959963984540054**2 / 10))


def test_share_of_nothing() -> None:
    assert share(0, 0) == {"value": None, "low": None, "high": None}


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[0] / sums[1]


def test_bootstrap_of_equal_pieces_has_no_width() -> None:
    assert bootstrap([[6.0] * 5, [2.0] * 5], mean) == {"value": 3.0, "low": 3.0, "high": 3.0}


def test_bootstrap_weighs_pieces_by_their_size() -> None:
    assert bootstrap([[1.0, 9.0], [1.0, 3.0]], mean)["value"] == 10 / 4


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    got = bootstrap([values, np.ones(400)], mean)
    half = 1.96 * values.std() / 20
    assert got["low"] == pytest.approx(values.mean() - half, abs=0.05)
    assert got["high"] == pytest.approx(values.mean() + half, abs=0.05)
    assert got == bootstrap([values, np.ones(400)], mean)


@pytest.mark.parametrize(
    ("alone", "beside", "p"), [(0, 0, 1.0), (3, 3, 1.0), (1, 9, 0.021484375), (9, 1, 0.021484375), (0, 5, 0.0625)]
)
def test_mcnemar_is_the_sign_test_of_the_differing_questions(alone: int, beside: int, p: float) -> None:
    one = [1] * alone + [0] * beside + [1, 1, 0]
    other = [0] * alone + [1] * beside + [1, 1, 0]
    assert mcnemar(one, other) == {"one": alone, "other": beside, "p": pytest.approx(p)}
