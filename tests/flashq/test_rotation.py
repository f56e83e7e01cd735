"""The rotation: its matrix, and that the result of a row does not depend on other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turboattention.flashq import rotate, rotation_matrix
from turboattention.flashq.rotation import ROTATION_ID

from ..helpers import normals
from . import formulas

DIMS = (8, 24, 40, 64, 80, 96, 128, 256)


@pytest.mark.parametrize("head_dim", DIMS)
def test_matrix_by_the_formula(head_dim):
    got = rotation_matrix(head_dim, torch.float64, torch.device("cpu")).numpy()
    # One rounding of 1 / sqrt(block) on either side.
    assert np.abs(got - formulas.rotation(head_dim)).max() <= 1e-15


def test_signs_of_the_first_channels():
    """The lowest byte of the golden ratio's bits is 0x15: channels 0, 2 and 4 change sign."""
    assert ROTATION_ID == 1
    first = rotation_matrix(8, torch.float64, torch.device("cpu"))[:, 0].sign()
    assert first.tolist() == [-1, 1, -1, 1, -1, 1, 1, 1]


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotate_is_the_matrix_product(head_dim, dtype):
    x = normals(2, 3, 5, head_dim, dtype=dtype)
    matrix = torch.from_numpy(formulas.rotation(head_dim))
    # Values of size 4 in sums that the float64 product rounds by 1e-15; then the dtype's own rounding.
    limit = 4 * torch.finfo(dtype).eps + 1e-14
    for inverse, m in ((False, matrix), (True, matrix.T)):
        got = rotate(x, inverse)
        assert got.dtype == dtype
        assert float((got.double() - x.double() @ m).abs().max()) <= limit


@pytest.mark.parametrize("head_dim", DIMS)
def test_products_and_vectors_survive(head_dim):
    x, y = normals(50, head_dim, seed=1, dtype=torch.float64), normals(50, head_dim, seed=2, dtype=torch.float64)
    # float64 sums of 256 products of size 10.
    assert float(((rotate(x) * rotate(y)).sum(-1) - (x * y).sum(-1)).abs().max()) <= 1e-11
    assert float((rotate(rotate(x), inverse=True) - x).abs().max()) <= 1e-13


def test_blocks_do_not_mix():
    """96 = 3 blocks of 32, which do not mix."""
    x = torch.zeros(1, 96)
    x[0, 40] = 1.0
    touched = rotate(x)[0].nonzero().flatten().tolist()
    assert touched == list(range(32, 64))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_outlier_channel_is_spread(head_dim):
    x = normals(64, head_dim)
    x[:, 5] += 100.0
    assert float(rotate(x).abs().max()) < 100 / head_dim**0.5 + 6


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64])
def test_a_row_does_not_depend_on_how_many_there_are(head_dim, rows):
    """Bit for bit: the codes of a token must not depend on the call that added it."""
    x = normals(2, 3, 193, head_dim)
    whole = rotate(x)
    assert torch.equal(rotate(x[:, :, :rows]), whole[:, :, :rows])
    assert torch.equal(rotate(x[:1, :1, 7 : 7 + rows].clone()), whole[:1, :1, 7 : 7 + rows])
    assert torch.equal(rotate(x.transpose(0, 1)).transpose(0, 1), whole)
