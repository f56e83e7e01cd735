"""The INT8 buffer: what it takes, and what it sets to zero."""

from __future__ import annotations

import pytest
import torch

from turboattention.kv.buffer import Int8Buffer
from turboattention.kv.pages import Tiles

CPU = torch.device("cpu")


def numbered(batch: int, rows: int, scale: float = 1.0) -> Tiles:
    """Row t of sequence b holds 10 b + t + 1 everywhere."""
    code = (10 * torch.arange(batch)[:, None] + torch.arange(rows) + 1).to(torch.int8)
    codes = code[:, None, :, None].expand(batch, 2, rows, 8)
    scales = (code[:, None] * scale).float().expand(batch, 2, rows)
    return Tiles(codes, -codes, scales, scales * 2)


def test_takes_rows_from_where_each_sequence_says():
    buffer = Int8Buffer(2, 2, 4, 8, True, CPU)
    buffer.take(numbered(2, 6), torch.tensor([1, 4]), torch.tensor([3, 2]))
    assert buffer.k8[:, 0, :, 0].tolist() == [[2, 3, 4, 0], [15, 16, 0, 0]]
    assert buffer.v8[:, 1, :, 7].tolist() == [[-2, -3, -4, 0], [-15, -16, 0, 0]]
    assert buffer.k_scale[:, 0].tolist() == [[2, 3, 4, 0], [15, 16, 0, 0]]
    assert buffer.tiles().v_scale[:, 1].tolist() == [[4, 6, 8, 0], [30, 32, 0, 0]]


def test_what_it_held_before_is_gone():
    buffer = Int8Buffer(1, 2, 4, 8, True, CPU)
    buffer.take(numbered(1, 4), torch.tensor([0]), torch.tensor([4]))
    buffer.take(numbered(1, 4), torch.tensor([3]), torch.tensor([1]))
    assert buffer.k8[0, 0, :, 0].tolist() == [4, 0, 0, 0]
    assert buffer.k_scale[0, 0].tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("token_scales, scale_bytes", [(True, 2), (False, 4)])
def test_nbytes(token_scales, scale_bytes):
    buffer = Int8Buffer(3, 2, 64, 16, token_scales, CPU)
    assert buffer.nbytes == 2 * 3 * 2 * 64 * (16 + scale_bytes)
    assert buffer.tiles().k_scale.dtype == torch.float32


def test_selecting_copies():
    buffer = Int8Buffer(3, 2, 4, 8, True, CPU)
    buffer.take(numbered(3, 4), torch.zeros(3, dtype=torch.int64), torch.tensor([4, 3, 2]))
    chosen = buffer.select(torch.tensor([2, 0, 2]))
    assert chosen.k8[:, 0, :, 0].tolist() == [[21, 22, 0, 0], [1, 2, 3, 4], [21, 22, 0, 0]]
    assert chosen.capacity == 4
    chosen.k8.zero_()
    assert buffer.k8[2, 0, 0, 0] == 21
    assert buffer.select(torch.zeros(0, dtype=torch.int64)).k8.shape == (0, 2, 4, 8)
