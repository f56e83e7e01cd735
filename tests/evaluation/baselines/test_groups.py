"""Min-max groups, and the quantizers that consist of them, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from turboattention.errors import UnsupportedError
from turboattention.evaluation.baselines.groups import min_max
from turboattention.evaluation.baselines.kivi import KiviKeys, KiviValues
from turboattention.evaluation.baselines.per_token import PerToken


def column(*values: float) -> torch.Tensor:
    """[1, 1, T, 1]."""
    return torch.tensor(values)[None, None, :, None]


def test_min_max_by_hand() -> None:
    # range -3 .. 6 in 2 bits: scale 3, codes 0, 1, round(4 / 3) = 1, 3
    values, bits = min_max(torch.tensor([-3.0, 0.0, 1.0, 6.0]), 2, 0)
    assert values.tolist() == [-3.0, 0.0, 0.0, 6.0]
    assert bits == 4 * 2 + 16 + 16


def test_min_max_of_one_value_is_that_value() -> None:
    assert min_max(torch.full((4,), 0.75), 2, 0).values.tolist() == [0.75] * 4


def test_min_max_stores_scale_and_min_in_float16() -> None:
    x = torch.tensor([0.1, 1.0])
    low, scale = torch.tensor(0.1).half().float(), torch.tensor(0.9).half().float()
    assert torch.equal(min_max(x, 1, 0).values, torch.stack([low, scale + low]))


def test_per_token_has_a_scale_for_each_token_of_each_head() -> None:
    x = torch.tensor([[[[0.0, 15.0, 7.4], [0.0, 150.0, 74.0]], [[0.0, 1.5, 0.74], [-15.0, 0.0, -7.6]]]])
    values, bits = PerToken(4)(x, 0)
    expected = torch.tensor([[[[0.0, 15.0, 7.0], [0.0, 150.0, 70.0]], [[0.0, 1.5, 0.7], [-15.0, 0.0, -8.0]]]])
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=0)
    assert bits == 12 * 4 + 4 * 32


def test_kivi_keys_group_tokens_of_a_channel() -> None:
    x = torch.cat([column(-3, 0, 1, 6, 0, 1, 2, 3), column(0, 30, 60, 90, 5, 5, 5, 5)], 3)
    values, bits = KiviKeys(2, group=4, residual=8)(x, 0)
    assert values[0, 0, :, 0].tolist() == [-3, 0, 0, 6, 0, 1, 2, 3]
    assert values[0, 0, :, 1].tolist() == [0, 30, 60, 90, 5, 5, 5, 5]
    assert bits == 16 * 2 + 4 * 32


def test_kivi_values_group_channels_of_a_token() -> None:
    x = torch.tensor([[[[-3.0, 0, 1, 6, 0, 10, 20, 30]]]])
    values, bits = KiviValues(2, group=4)(x, 0)
    assert values.flatten().tolist() == [-3, 0, 0, 6, 0, 10, 20, 30]
    assert bits == 8 * 2 + 2 * 32


def test_kivi_windows() -> None:
    keys, values = KiviKeys(2), KiviValues(2)
    assert [keys.settled(n) for n in (1, 127, 128, 129, 300)] == [0, 0, 128, 128, 256]
    assert [values.settled(n) for n in (1, 128, 129, 300)] == [0, 0, 1, 172]


@pytest.mark.parametrize("bits, expected", [(2, 3.0), (4, 5.0)])
def test_kivi_takes_a_bit_more_than_its_codes(bits: int, expected: float) -> None:
    x = torch.randn(2, 3, 128, 64)
    for quantizer in (KiviKeys(bits), KiviValues(bits)):
        assert quantizer(x, 0).bits / x.numel() == expected


def test_kivi_refuses_channels_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedError, match="head_dim: expected a multiple of the method's group size 32, got 80"):
        KiviValues(2)(torch.randn(1, 1, 4, 80), 0)
