"""OSCAR: the fit of its rotations, their effect, its windows and its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turboattention.errors import UnsupportedError
from turboattention.evaluation.baselines.hadamard import rotate_blocks
from turboattention.evaluation.baselines.oscar import (
    ClippedInt2,
    Moments,
    bit_reversal,
    clipped,
    moments,
    quantizers,
    rotation,
)


def test_moments_by_hand() -> None:
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[None, None].repeat(1, 2, 1, 1)  # two query heads of one KV head
    k = torch.tensor([[1.0, 1.0], [0.0, 1.0]])[None, None]
    v = torch.tensor([[1.0, 0.0], [1.0, 1.0]])[None, None]
    found = moments(q, k, v)
    # Q^T Q of both heads over two tokens: diag(1, 4); k (Q^T Q) k^T: 5 and 4.
    assert found.keys.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert found.values.tolist() == [[(5 + 4) / 2, 4 / 2], [4 / 2, 4 / 2]]


def test_rotation_is_eigenvectors_hadamard_and_bit_reversal() -> None:
    spread = torch.diag(torch.tensor([1.0, 16.0, 4.0, 9.0], dtype=torch.float64))
    matrix = rotation(spread)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4, dtype=torch.float64))
    # By falling eigenvalue: channels 1, 3, 2, 0, each up to its sign.
    unmixed = rotate_blocks(matrix[:, bit_reversal(4)], 4).abs()
    torch.testing.assert_close(unmixed, torch.eye(4, dtype=torch.float64)[:, [1, 3, 2, 0]])
    # Every direction then has an equal share of what attention asks for.
    torch.testing.assert_close((matrix.T @ spread @ matrix).diagonal(), torch.full((4,), 7.5, dtype=torch.float64))


def test_bit_reversal() -> None:
    assert bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    with pytest.raises(UnsupportedError, match="head_dim: expected a power of two for OSCAR's permutation, got 96"):
        bit_reversal(96)


def test_clips_at_the_quantile_of_magnitudes() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0, 50.0]])
    assert clipped(x, 0.7).tolist() == [[1.0, -2.0, 3.0, -4.0, 4.0]]
    assert clipped(x, 1.0).tolist() == x.tolist()


def test_windows_and_bits() -> None:
    quantizer = ClippedInt2(torch.eye(128).double(), 0.96)
    assert [quantizer.settled(n) for n in (0, 256, 257, 1000)] == [0, 0, 1, 744]
    x = torch.randn(1, 2, 744, 128)
    values, bits = quantizer(x, 0)
    assert torch.equal(values[:, :, :64], x[:, :, :64])
    assert not torch.equal(values[:, :, 64:], x[:, :, 64:])
    assert bits == 2 * 128 * (64 * 16 + 680 * 2.25)
    torch.testing.assert_close(values[:, :, 100:], quantizer(x[:, :, 100:], 100).values)
    # Four levels in each group of 128 channels.
    assert all(len(row.unique()) <= 4 for row in values[0, 0, 64:])


def attention_error(x: Tensor, restored: Tensor, q: Tensor) -> float:
    """The effect of key errors on logits."""
    return ((q @ (restored - x).mT).norm() / (q @ x.mT).norm()).item()


def test_a_fitted_rotation_serves_the_queries_better_than_hadamard_alone() -> None:
    """Queries look along few directions in which keys are small: OSCAR's case."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q
    size = torch.logspace(0, -1.5, 128)
    q = torch.randn(1, 1, 400, 128, generator=generator) * size @ basis
    k = torch.randn(1, 1, 400, 128, generator=generator) * size.flip(0) @ basis
    (keys,), _ = quantizers([moments(q, k, k)])
    (plain,), _ = quantizers([Moments(torch.eye(128).double(), torch.eye(128).double())])
    fitted, hadamard = (attention_error(k, each(k, 64).values, q) for each in (keys, plain))
    assert fitted < hadamard
