"""Q4_0 and the compander: levels computed by hand, the published size, and the effect of the rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turboattention.errors import UnsupportedError
from turboattention.evaluation.baselines.compander import Compander, curve, grid
from turboattention.evaluation.baselines.hadamard import rotate_blocks
from turboattention.evaluation.baselines.q4_0 import RotatedQ40, q4_0


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def test_q4_0_by_hand() -> None:
    x = torch.zeros(64)
    x[:4] = torch.tensor([-8.0, 7.4, 3.5, -0.5])  # scale 1: the largest magnitude is negative
    x[32:35] = torch.tensor([16.0, -14.0, 1.1])  # scale -2: it is positive, and 16 is stored as -8
    values, bits = q4_0(x)
    assert values[:4].tolist() == [-8.0, 7.0, 4.0, 0.0]
    assert values[32:35].tolist() == [16.0, -14.0, 2.0]
    assert not values[4:32].any()
    assert bits == 64 * 4 + 2 * 16


def test_q4_0_keeps_zero_and_counts_half_a_bit_for_scales() -> None:
    x = torch.randn(2, 3, 5, 128)
    x[:, :, 2] = 0
    values, bits = RotatedQ40()(x, 0)
    assert not values[:, :, 2].any()
    assert bits / x.numel() == 4.5
    assert RotatedQ40().settled(77) == 77


def test_rotation_is_over_the_head_where_its_size_is_served() -> None:
    x = torch.randn(1, 1, 4, 128)
    x[..., 5] *= 50
    whole, blocks = RotatedQ40()(x, 0).values, q4_0(x).values
    rest = [at for at in range(128) if at != 5]
    assert relative(whole[..., rest], x[..., rest]) < relative(blocks[..., rest], x[..., rest])
    torch.testing.assert_close(whole, rotate_blocks(q4_0(rotate_blocks(x, 128)).values, 128))
    odd = torch.randn(1, 1, 4, 96)
    torch.testing.assert_close(RotatedQ40()(odd, 0).values, q4_0(odd).values)


def test_grid_is_the_curve_at_the_middles_of_equal_steps() -> None:
    levels, borders = grid(2)
    t = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(levels, 0.65 * t + 0.35 * t**3)
    torch.testing.assert_close(borders, curve(torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)))
    # Denser near zero than at the ends.
    steps = grid(4)[0].diff()
    assert steps[7] < 0.7 * steps[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compander_rounds_within_its_borders(bits: int) -> None:
    x = torch.randn(1, 2, 50, 64)
    values, size = Compander(bits)(x, 0)
    assert size / x.numel() == bits + 0.5
    groups, restored = (rotate_blocks(y, 32).unflatten(-1, (-1, 32)).double() for y in (x, values))
    largest = groups.abs().amax(-1, keepdim=True)
    levels, borders = grid(bits)
    ends = torch.cat([torch.tensor([-1.0 - 1e-6]).double(), borders, torch.tensor([1.0 + 1e-6]).double()])
    at = (restored / largest)[..., None].sub(levels).abs().argmin(-1)
    scaled = groups / largest
    assert ((scaled >= ends[at] - 1e-5) & (scaled <= ends[at + 1] + 1e-5)).all()


@pytest.mark.parametrize("bits, ratio", [(2, 0.98), (3, 0.995), (4, 1.0)])
def test_companding_beats_equal_steps_on_what_is_nearly_normal(bits: int, ratio: float) -> None:
    x = torch.randn(1, 1, 4000, 32, generator=torch.Generator().manual_seed(0))
    turned, half = rotate_blocks(x, 32), 2 ** (bits - 1)
    largest = turned.abs().amax(-1, keepdim=True)
    even = (((turned / largest + 1) * half).floor().clamp(0, 2 * half - 1) + 0.5 - half) / half * largest
    assert relative(Compander(bits)(x, 0).values, x) < ratio * relative(rotate_blocks(even, 32), x)


def test_an_outlier_stays_in_its_group() -> None:
    x = torch.randn(1, 1, 3, 64)
    quiet = Compander(3)(x, 0).values
    x[..., 40] = 100
    assert torch.equal(Compander(3)(x, 0).values[..., :32], quiet[..., :32])


@pytest.mark.parametrize("quantizer", [RotatedQ40(), Compander(4)])
def test_other_sizes_are_refused(quantizer) -> None:
    with pytest.raises(UnsupportedError, match=r"head_dim: expected a multiple of .* 32, got 40"):
        quantizer(torch.randn(1, 1, 2, 40), 0)
