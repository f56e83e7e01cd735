"""Priorities and widths on numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import ConfigError, ShapeError
from turboattention.flashq import assign_head_bits, head_priority


def hand_made() -> torch.Tensor:
    """[1, 3, 3, 2]: heads with channel gaps (1, 3), (2, 2) and (10, 0)."""
    return torch.tensor(
        [
            [[0.0, 0.0], [1.0, 3.0], [0.5, 1.0]],  # gap 3 - 0, std of (1, 3) = 1
            [[-1.0, 4.0], [1.0, 6.0], [0.0, 5.0]],  # gap 6 + 1, std of (2, 2) = 0
            [[-5.0, 2.0], [5.0, 2.0], [0.0, 2.0]],  # gap 10, std of (10, 0) = 5
        ]
    )[None]


def test_gap_times_population_std():
    assert head_priority(hand_made()).tolist() == [3.0, 0.0, 50.0]


def test_mean_over_the_batch():
    k = torch.cat((hand_made(), 2 * hand_made()))
    # Both factors double: 4 times the priority; the mean of 1 and 4 is 2.5.
    assert head_priority(k).tolist() == [7.5, 0.0, 125.0]


def test_constant_head_has_priority_zero():
    assert head_priority(torch.full((2, 1, 5, 8), -3.0)).tolist() == [0.0]
    assert head_priority(torch.randn(1, 2, 1, 8)).tolist() == [0.0, 0.0]  # one token has no gaps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    got = head_priority(hand_made().to(dtype))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.tolist() == [3.0, 0.0, 50.0]


def test_heads_are_scored_alone():
    k = torch.randn(2, 5, 30, 16) * torch.arange(1.0, 6.0)[:, None, None]
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(head_priority(k[:, order]), head_priority(k)[order])


@pytest.mark.parametrize("shape", [(3, 4, 8), (0, 2, 4, 8), (1, 2, 0, 8)])
def test_shapes_refused(shape):
    with pytest.raises(ShapeError, match=r"^k: expected a non-empty \[batch, kv_heads, tokens, head_dim\], got shape "):
        head_priority(torch.zeros(shape))


@pytest.mark.parametrize(
    "priority, fraction, bits",
    [
        ([5.0, 1.0, 3.0, 2.0], 0.5, [4, 2, 4, 2]),
        ([1.0, 1.0, 1.0, 1.0], 0.5, [2, 2, 4, 4]),  # ties: the lower index first
        ([2.0, 1.0, 1.0, 1.0], 0.5, [4, 2, 2, 4]),
        ([3.0, 2.0, 1.0], 0.5, [4, 4, 2]),  # floor(1.5) = 1
        ([3.0, 2.0, 1.0, 0.0], 0.99, [4, 2, 2, 2]),  # floor(3.96) = 3
        ([1.0], 0.5, [4]),  # a single head keeps 4 bits
        ([1.0], 1.0, [2]),
        ([1.0, 2.0], 0.0, [4, 4]),
        ([1.0, 2.0], 1.0, [2, 2]),
    ],
)
def test_assignment(priority, fraction, bits):
    got = assign_head_bits(torch.tensor(priority), fraction)
    assert got.dtype == torch.int64
    assert got.tolist() == bits


def test_half_is_the_default():
    assert assign_head_bits(torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [4, 4, 2, 2]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0, 1))
def test_no_head_with_two_bits_is_above_one_with_four(priority, fraction):
    bits = assign_head_bits(torch.tensor(priority), fraction).tolist()
    assert bits.count(2) == int(fraction * len(priority))
    scores = torch.tensor(priority).tolist()
    low = [p for p, b in zip(scores, bits, strict=True) if b == 2]
    high = [p for p, b in zip(scores, bits, strict=True) if b == 4]
    assert not low or not high or max(low) <= min(high)


def test_refusals():
    with pytest.raises(ShapeError, match=r"^priority: expected \[kv_heads\], got shape \(2, 2\)$"):
        assign_head_bits(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"^low_bit_fraction: expected a number from 0 to 1, got 1.5$"):
        assign_head_bits(torch.zeros(2), 1.5)
