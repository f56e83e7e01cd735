from __future__ import annotations

import pytest

from turboattention.benchmarking.statistics import Spread, fit_line, paired_ratio, quantile, spread


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1, 5.0)])
def test_quantiles_are_linear_between_samples_and_sort_them(share: float, value: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], share) == pytest.approx(value)


def test_one_sample_is_every_quantile() -> None:
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="values: expected at least one"):
        spread([])


def test_a_paired_ratio_is_taken_pair_by_pair() -> None:
    # The machine is ten times slower in the second half: the ratio does not notice.
    assert paired_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == Spread(2.0, 2.0, 2.0, 4)
    assert paired_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median == 2.0


def test_pairs_are_whole() -> None:
    with pytest.raises(ValueError, match=r"over: expected as many samples as under \(2\), got 1"):
        paired_ratio([1.0], [1.0, 2.0])


def test_a_line_through_points_on_it() -> None:
    line = fit_line([1, 2, 4], [3.0, 5.0, 9.0])
    assert (line.base, line.slope, line.deviation) == pytest.approx((1.0, 2.0, 0.0))


def test_a_point_off_the_line() -> None:
    assert fit_line([1, 2, 3], [1.0, 3.0, 3.0]).deviation > 0.2
    with pytest.raises(ValueError, match="two different values"):
        fit_line([1, 1], [1.0, 2.0])
