"""Widths of KV heads: as given, or as decided from the first block."""

from __future__ import annotations

import re

import pytest
import torch

from turboattention.config import TurboConfig
from turboattention.errors import ConfigError
from turboattention.kv.widths import mixed_head_bits, parse_head_bits, uniform_head_bits


@pytest.mark.parametrize(
    "given, want",
    [
        ([4, 2, 8], [[4, 2, 8], [4, 2, 8]]),
        ((3, 3, 3), [[3, 3, 3], [3, 3, 3]]),
        ([[4, 4, 2], [2, 3, 8]], [[4, 4, 2], [2, 3, 8]]),
        (torch.tensor([[4, 4, 2], [2, 3, 8]], dtype=torch.int32), [[4, 4, 2], [2, 3, 8]]),
        (torch.tensor([2, 3, 4], dtype=torch.uint8), [[2, 3, 4], [2, 3, 4]]),
    ],
)
def test_given_widths(given, want):
    got = parse_head_bits(given, 3)
    assert got.dtype == torch.int64
    assert got.tolist() == want


def test_no_widths():
    assert parse_head_bits(None, 3) is None


def test_two_heads_read_as_keys_and_values_only_when_nested():
    assert parse_head_bits([4, 2], 2).tolist() == [[4, 2], [4, 2]]


def test_one_head():
    assert parse_head_bits([4], 1).tolist() == [[4], [4]]
    assert parse_head_bits([[4], [2]], 1).tolist() == [[4], [2]]


def test_widths_are_copied():
    given = torch.tensor([[4, 4], [2, 2]])
    got = parse_head_bits(given, 2)
    given.fill_(3)
    assert got.tolist() == [[4, 4], [2, 2]]


@pytest.mark.parametrize(
    "given, message",
    [
        ([4, 2], "expected shape (3,) or (2, 3), got (2,)"),
        ([[4, 2, 2]], "expected shape (3,) or (2, 3), got (1, 3)"),
        ([4, 5, 2], "expected widths of 2, 3, 4, 8, got [[4, 5, 2], [4, 5, 2]]"),
        ([4.5, 2.0, 2.0], "expected integers, got torch.float32"),
        ([True, True, True], "expected integers, got torch.bool"),
        ("422", "expected integers, got '422'"),
        ([[4, 2, 2], [4]], "expected integers, got [[4, 2, 2], [4]]"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ConfigError, match=f"^head_bits: {re.escape(message)}$"):
        parse_head_bits(given, 3)


@pytest.mark.parametrize(
    "bits, want", [(4, [[4, 4], [4, 4]]), (3, [[3, 3], [3, 3]]), ((4, 2), [[4, 4], [2, 2]]), (8, [[8, 8], [8, 8]])]
)
def test_fixed_widths_do_not_depend_on_tokens(bits, want):
    assert uniform_head_bits(TurboConfig(bits="mixed"), 2) is None
    assert uniform_head_bits(TurboConfig(bits=bits), 2).tolist() == want


def spread(*sizes: float) -> torch.Tensor:
    """[1, H, 4, 8]: heads whose priority grows with their size."""
    base = torch.zeros(4, 8)
    base[0, :4], base[1, 4:] = 1.0, -3.0
    return torch.stack([size * base for size in sizes])[None]


def test_mixed_scores_keys_and_values_apart():
    got = mixed_head_bits(TurboConfig(bits="mixed"), spread(3, 1, 2, 4), spread(1, 4, 3, 2))
    assert got.tolist() == [[4, 2, 2, 4], [2, 4, 4, 2]]


def test_mixed_takes_the_fraction():
    config = TurboConfig(bits="mixed", low_bit_fraction=0.25)
    assert mixed_head_bits(config, spread(3, 1, 2, 4), spread(1, 4, 3, 2)).tolist() == [[4, 2, 4, 4], [2, 4, 4, 4]]


def test_mixed_with_a_single_head_means_four_bits():
    assert mixed_head_bits(TurboConfig.paper(bits="mixed"), spread(1), spread(1)).tolist() == [[4], [4]]
