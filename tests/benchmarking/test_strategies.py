"""The comparison of strategies: its table, and differences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("transformers")

from ..calibration.samples import calibration
from ..scripts import benchmark_script


@pytest.fixture(scope="module")
def strategies() -> Iterator[ModuleType]:
    with benchmark_script("strategies.py") as module:
        yield module


def test_differences_are_between_the_same_tokens(strategies):
    """Texts differ far more than methods, so the interval is that of the difference."""
    rng = np.random.default_rng(0)
    theirs = [{"kl": scale * rng.random(600)} for scale in (0.1, 5.0, 90.0)]
    ours = [{"kl": x["kl"] + 0.01} for x in theirs]
    found = strategies.difference(ours, theirs)
    assert [found[name] for name in ("value", "low", "high")] == pytest.approx([0.01] * 3)


def test_methods_differ_in_widths_alone(strategies):
    methods = strategies.methods(calibration(0.1, 0.4))
    assert methods["error 3"].calibration.strategy == "error"
    assert methods["priority 2.5"].calibration.average_bits <= 2.5
    assert methods["error 3, means"].calibration.means
    rest = {m.config.replace(bits=4) for m in methods.values()}
    assert len(rest) == 1


def test_the_page_has_the_table_of_the_results(strategies):
    result = json.loads(strategies.RESULTS.read_text(encoding="utf-8"))
    _, section, _ = strategies.PAGE.read_text(encoding="utf-8").split(strategies.MARK)
    assert section.strip() == strategies.table(result).strip()


def test_error_beats_priority_at_every_budget(strategies):
    """Which is why it is the default: below by more than the intervals, at three budgets."""
    rows = json.loads(strategies.RESULTS.read_text(encoding="utf-8"))["rows"]
    for budget in ("2.5", "3", "3.5"):
        assert rows[f"error {budget}"]["kl"]["high"] < rows[f"priority {budget}"]["kl"]["low"]
        assert rows[f"error {budget}"]["bits_per_element"] <= rows[f"priority {budget}"]["bits_per_element"] + 0.02
