"""TurboQuant-MSE: the codebook's published values, its published distortion, and its size."""

from __future__ import annotations

import math

import pytest
import torch

from turboattention.evaluation.baselines.turboquant import TurboQuantMse, codebook, random_rotation


@pytest.mark.parametrize(
    "bits, expected", [(1, [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)]), (2, [-1.510, -0.453, 0.453, 1.510])]
)
def test_codebook_in_high_dimensions(bits: int, expected: list[float]) -> None:
    # Section 3.1 gives these for the normal limit, in units of 1 / sqrt(d).
    got = codebook(4096, bits) * 4096**0.5
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-3)


def test_codebook_in_three_dimensions_is_uniform() -> None:
    # A coordinate of a random unit vector in 3 dimensions is uniform on [-1, 1]: the best 4 levels are known.
    torch.testing.assert_close(
        codebook(3, 2), torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bits, distortion", [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_published_distortion(bits: int, distortion: float) -> None:
    # Theorem 1: these values of E |x - x'|^2 for unit x at 1 to 4 bits (rounded in the paper).
    x = torch.randn(1, 1, 2000, 128)
    x = x / x.norm(dim=-1, keepdim=True)
    values, _ = TurboQuantMse(bits)(x, 0)
    assert (values - x).square().sum(-1).mean() == pytest.approx(distortion, rel=0.15)


def test_an_outlier_channel_costs_nothing() -> None:
    x = torch.nn.functional.one_hot(torch.arange(64), 64).float()[None, None]
    values, _ = TurboQuantMse(4)(100 * x, 0)
    assert (values - 100 * x).square().sum(-1).mean().item() / 1e4 < 0.012


def test_scales_with_the_norm_and_keeps_zero() -> None:
    x = torch.randn(1, 2, 5, 64)
    x[:, :, 0] = 0
    torch.testing.assert_close(TurboQuantMse(3)(8 * x, 0).values, 8 * TurboQuantMse(3)(x, 0).values)
    assert not TurboQuantMse(3)(x, 0).values[:, :, 0].any()


def test_takes_its_bits_and_a_norm() -> None:
    x = torch.randn(2, 3, 5, 64)
    assert TurboQuantMse(4)(x, 0).bits / x.numel() == 4 + 16 / 64
    assert TurboQuantMse(4).settled(77) == 77


def test_rotation_is_orthogonal_and_the_seed_s() -> None:
    rotation = random_rotation(64, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64, dtype=torch.float64))
    assert not torch.equal(rotation, random_rotation(64, 1))
