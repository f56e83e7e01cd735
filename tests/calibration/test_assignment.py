"""Which head gets which width."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.calibration import assign_bits
from turboattention.calibration.assignment import chosen_error, keep_bounds
from turboattention.config import WIDTHS
from turboattention.errors import ConfigError, InputError, ShapeError

from .samples import layer


def costs(*rows: list[float]) -> torch.Tensor:
    """[2, len(rows) / 2, 4] from what each of K's heads, then V's, loses at 2, 3, 4 and 8 bits."""
    return torch.tensor(rows, dtype=torch.float64).reshape(2, -1, len(WIDTHS))


def total(scores: list[torch.Tensor], bits: list[torch.Tensor]) -> float:
    index = [torch.tensor([[WIDTHS.index(int(b)) for b in row] for row in layer]) for layer in bits]
    return sum(float(s.gather(-1, i[..., None]).sum()) for s, i in zip(scores, index, strict=True))


def average(bits: list[torch.Tensor]) -> float:
    return float(torch.cat([x.flatten() for x in bits]).double().mean())


# -- by error ----------------------------------------------------------------------------------------


def test_bits_go_where_they_save_most():
    scores = [costs([8, 4, 2, 0], [1, 0.5, 0.25, 0]), costs([16, 1, 0, 0], [0, 0, 0, 0])]
    # 16 -> 1, 8 -> 4, 4 -> 2, then 2 -> 0 of layer 0 would take 4 bits (0.5 a bit) and 1 -> 0 takes one.
    bits = assign_bits(scores, 3.0)
    assert [x.tolist() for x in bits] == [[[4], [2]], [[4], [2]]]
    assert all(x.dtype == torch.int64 for x in bits)


def test_a_step_may_be_of_several_widths():
    """Nothing is gained at 3 bits, all at 4."""
    assert assign_bits([costs([9, 9, 0, 0], [1, 0.9, 0.8, 0.8])], 3.0)[0].tolist() == [[4], [2]]


def test_a_step_that_the_budget_has_no_room_for_is_passed_over():
    """8 bits would save most per bit, and cost 6."""
    assert assign_bits([costs([90, 89, 88, 0], [1, 0, 0, 0])], 3.5)[0].tolist() == [[4], [3]]


def test_evenly_each_layer_spends_its_own():
    """Layer 0 would save more, but the bits of layer 1 cannot be moved to it."""
    scores = [costs([80, 40, 20, 0], [10, 5, 2, 0]), costs([3, 2, 1.9, 0], [2, 1, 1, 0])]
    assert [int(x.sum()) for x in assign_bits(scores, 3.0)] == [8, 4]
    even = assign_bits(scores, 3.0, "even")
    assert [x.tolist() for x in even] == [[[4], [2]], [[3], [3]]]
    assert all(torch.equal(x, assign_bits([score], 3.0)[0]) for x, score in zip(even, scores, strict=True))


@pytest.mark.parametrize("budget", [2, 2.3, 3, 3.25, 4, 5.5, 8])
def test_the_budget_is_kept_and_used(budget):
    scores = [layer(level).costs for level in (0.1, 0.3, 0.05, 0.7)]
    bits = assign_bits(scores, budget)
    assert average(bits) <= budget + 1e-9
    assert average(bits) > budget - (4 / 16 if budget > 4 else 1 / 16) - 1e-9


def test_ends_of_the_range():
    assert assign_bits([layer().costs], 2)[0].tolist() == [[2, 2], [2, 2]]
    assert assign_bits([layer().costs], 8)[0].tolist() == [[8, 8], [8, 8]]


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=4, max_size=4), st.integers(0, 8))
def test_never_worse_than_the_same_width_everywhere(drawn, more):
    """Falling and convex in bits, as errors are: there greedy misses the best by one step at most."""
    rows = [[float(sum(sorted(x)[:n])) for n in (4, 3, 2, 0)] for x in drawn]
    scores = [costs(*rows)]
    bits = assign_bits(scores, 2 + more / 4)
    choices = [c for c in itertools.product((2, 3, 4), repeat=4) if sum(c) <= 8 + more]
    best = min(total(scores, [torch.tensor(c).reshape(2, 2)]) for c in choices)
    worst_step = max(max(a - b for a, b in itertools.pairwise(row)) for row in rows)
    assert total(scores, bits) <= best + worst_step


def test_order_of_layers_does_not_matter():
    scores = [layer(level).costs for level in (0.1, 0.3, 0.05)]
    forward, back = assign_bits(scores, 3.0), assign_bits(scores[::-1], 3.0)
    assert total(scores, forward) == pytest.approx(total(scores, back[::-1]))


# -- by priority -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, keys, values",
    [
        (2, [2, 2, 2, 2], [2, 2, 2, 2]),
        (2.5, [4, 2, 2, 2], [4, 2, 2, 2]),
        (3, [4, 2, 4, 2], [4, 2, 4, 2]),
        (3.25, [4, 2, 4, 2], [4, 2, 4, 4]),  # half a head that K has no use for
        (4, [4, 4, 4, 4], [4, 4, 4, 4]),
        (5, [8, 4, 4, 4], [8, 4, 4, 4]),
        (8, [8, 8, 8, 8], [8, 8, 8, 8]),
    ],
)
def test_the_lowest_priority_takes_the_narrow_width(budget, keys, values):
    priority = torch.tensor([[9.0, 1.0, 5.0, 2.0], [9.0, 1.0, 5.0, 2.0]])
    assert assign_bits([priority], budget, "priority")[0].tolist() == [keys, values]


@pytest.mark.parametrize("budget", [2.25, 2.5, 3, 3.75, 6])
def test_priority_uses_the_budget_even_with_one_head_a_layer(budget):
    bits = assign_bits([torch.ones(2, 1) for _ in range(16)], budget, "priority")
    assert average(bits) == pytest.approx(budget)


def test_keys_values_and_layers_are_ranked_apart():
    priority = [torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([[100.0, 99.0], [0.0, 0.0]])]
    bits = assign_bits(priority, 3.0, "priority")
    assert [x.tolist() for x in bits] == [[[2, 4], [4, 2]], [[4, 2], [2, 4]]]


# -- bounds ------------------------------------------------------------------------------------------


def test_errors_of_keys_and_values_add_in_squares():
    errors = torch.tensor([[[0.3, 0.2, 0.1, 0.0]], [[0.4, 0.4, 0.4, 0.0]]])
    assert chosen_error(torch.tensor([[2], [3]]), errors).tolist() == pytest.approx([0.5])


def test_heads_beyond_their_bound_are_widened():
    """At 2 bits 0.7 is allowed, at 3 bits 0.6, at 4 bits 0.3, at 8 bits 0.05: where even that is not kept, it stays."""
    errors = torch.zeros(2, 4, 4, dtype=torch.float64)
    errors[0] = torch.tensor([[0.6, 0, 0, 0], [0.8, 0.5, 0, 0], [0.8, 0.7, 0.2, 0], [1, 1, 1, 1]])
    bits = keep_bounds([torch.full((2, 4), 2)], [errors])[0]
    assert bits.amin(0).tolist() == [2, 3, 4, 8]


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.9, 8.1, float("nan"), True, "3"])
def test_budgets_out_of_range(budget):
    with pytest.raises(ConfigError, match="budget: expected an average width from 2 to 8 bits, got"):
        assign_bits([layer().costs], budget)


def test_other_strategies():
    with pytest.raises(ConfigError, match="strategy: expected one of error, even, priority, got 'best'"):
        assign_bits([layer().costs], 3, "best")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "strategy, shape", [("error", r"\[2, Hkv, 4\]"), ("even", r"\[2, Hkv, 4\]"), ("priority", r"\[2, Hkv\]")]
)
def test_shapes(strategy, shape):
    good = layer().costs if strategy != "priority" else layer().priority
    with pytest.raises(ShapeError, match=rf"scores: expected {shape} for '{strategy}', got .* in layer 1"):
        assign_bits([good, torch.zeros(3, 2)], 3, strategy)


def test_scores_that_are_no_numbers():
    bad = layer().costs.clone()
    bad[0, 1, 2] = torch.nan
    with pytest.raises(InputError, match="scores: expected finite values, got NaN or infinity in layer 1"):
        assign_bits([layer().costs, bad], 3)
