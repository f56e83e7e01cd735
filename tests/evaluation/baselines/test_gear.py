"""GEAR-L: backbone, low-rank factors, and their size."""

from __future__ import annotations

import torch

from turboattention.evaluation.baselines.gear import GearL, low_rank
from turboattention.evaluation.baselines.groups import min_max


def test_low_rank_finds_an_error_of_that_rank() -> None:
    error = torch.randn(2, 3, 64, 2) @ torch.randn(2, 3, 2, 32)
    left, right = low_rank(error, 2, 3)
    assert left.shape == (2, 3, 64, 2)
    assert right.shape == (2, 3, 32, 2)
    torch.testing.assert_close(left @ right.transpose(2, 3), error, rtol=0, atol=0.02)


def test_low_rank_by_hand() -> None:
    # A rank of one: A = error's direction over tokens, B = its row.
    error = torch.tensor([3.0, 4.0])[:, None] * torch.tensor([1.0, 2.0, 2.0])
    left, right = low_rank(error[None, None], 1, 3)
    sign = left[0, 0, 0, 0].sign()
    torch.testing.assert_close(sign * left.flatten(), torch.tensor([0.6, 0.8]), rtol=1e-3, atol=0)
    torch.testing.assert_close(sign * right.flatten(), torch.tensor([5.0, 10.0, 10.0]), rtol=1e-3, atol=0)


def test_low_rank_comes_near_the_best() -> None:
    spectrum = torch.diag(2.0 ** -torch.arange(32))
    turn = [torch.linalg.qr(torch.randn(n, 32)).Q for n in (64, 32)]
    error = (turn[0] @ spectrum @ turn[1].T)[None, None]
    left, right = low_rank(error, 4, 3)
    best = spectrum.diagonal()[4:].norm()
    assert (error - left @ right.transpose(2, 3)).norm() < 1.1 * best


def test_kcvt_keys_have_one_scale_a_channel_and_values_one_a_token_over_heads() -> None:
    x = torch.randn(1, 2, 64, 8)
    for axis, dim, groups in (("channel", 2, 2 * 8), ("token", (1, 3), 64)):
        values, bits = GearL(axis, 4, prompt_rank=3)(x, 0)  # type: ignore[arg-type]
        backbone = min_max(x, 4, dim).values
        left, right = low_rank(x - backbone, 3, 3)
        torch.testing.assert_close(values, backbone + left @ right.transpose(2, 3))
        assert bits == 4 * x.numel() + 32 * groups + 16 * 2 * 3 * (64 + 8)


def test_later_groups_are_compressed_alone_with_the_lower_rank() -> None:
    x = torch.randn(1, 2, 128, 64)
    quantizer = GearL("channel", 2, group=64)
    together = quantizer(x, 64)
    apart = [quantizer(part, 64) for part in x.split(64, 2)]
    torch.testing.assert_close(together.values, torch.cat([part.values for part in apart], 2))
    codes, scales, factors = 2 * x.numel(), 32 * 2 * 2 * 64, 16 * 2 * 2 * 2 * (64 + 64)
    assert together.bits == sum(part.bits for part in apart) == codes + scales + factors


def test_factors_bring_values_nearer() -> None:
    x = torch.randn(1, 2, 512, 64) + 3 * torch.randn(1, 2, 512, 1)
    plain, whole = GearL("token", 2, 64, prompt_rank=0)(x, 0), GearL("token", 2, 64)(x, 0)
    assert (whole.values - x).norm() < 0.97 * (plain.values - x).norm()


def test_waits_for_a_full_buffer() -> None:
    assert [GearL("token", 4).settled(n) for n in (1, 63, 64, 1000)] == [0, 0, 64, 960]
