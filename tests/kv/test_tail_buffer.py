"""The INT8 tail buffer: its size, and the rows that it sets to zero."""

from __future__ import annotations

import pytest
import torch

from turboattention.kv.pages import Tiles
from turboattention.kv.tail_buffer import TailBuffer

CPU = torch.device("cpu")


def numbered(batch: int, rows: int, scale: float = 1.0) -> Tiles:
    """Row t of sequence b holds 10 b + t + 1 everywhere."""
    code = (10 * torch.arange(batch)[:, None] + torch.arange(rows) + 1).to(torch.int8)
    codes = code[:, None, :, None].expand(batch, 2, rows, 8)
    scales = (code[:, None] * scale).float().expand(batch, 2, rows)
    return Tiles(codes, -codes, scales, scales * 2)


def test_takes_rows_from_where_each_sequence_says():
    buffer = TailBuffer(2, 2, 4, 8, True, CPU)
    buffer.take(numbered(2, 6), torch.tensor([1, 4]), torch.tensor([3, 2]), 0)
    assert buffer.k8[:, 0, :, 0].tolist() == [[2, 3, 4, 0], [15, 16, 0, 0]]
    assert buffer.v8[:, 1, :, 7].tolist() == [[-2, -3, -4, 0], [-15, -16, 0, 0]]
    assert buffer.k_scale[:, 0].tolist() == [[2, 3, 4, 0], [15, 16, 0, 0]]
    assert buffer.tiles().v_scale[:, 1].tolist() == [[4, 6, 8, 0], [30, 32, 0, 0]]


def test_what_it_held_before_is_gone():
    buffer = TailBuffer(1, 2, 4, 8, True, CPU)
    buffer.take(numbered(1, 4), torch.tensor([0]), torch.tensor([4]), 0)
    buffer.take(numbered(1, 4), torch.tensor([3]), torch.tensor([1]), 0)
    assert buffer.k8[0, 0, :, 0].tolist() == [4, 0, 0, 0]
    assert buffer.k_scale[0, 0].tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("token_scales, scale_bytes", [(True, 2), (False, 4)])
@pytest.mark.parametrize("tokens, rows", [(0, 16), (1, 16), (16, 16), (17, 32), (48, 48), (49, 63), (63, 63)])
def test_nbytes(token_scales, scale_bytes, tokens, rows):
    """As many rows as the longest sequence needs, in multiples of 16."""
    buffer = TailBuffer(3, 2, 63, 16, token_scales, CPU)
    buffer.take(numbered_like(3, 64, 16), torch.zeros(3, dtype=torch.int64), torch.tensor([0, tokens, tokens // 2]), 0)
    assert buffer.rows == buffer.rows_for(tokens, 64) == rows
    assert buffer.nbytes == 2 * 3 * 2 * rows * (16 + scale_bytes)
    assert buffer.tiles().k_scale.dtype == torch.float32


@pytest.mark.parametrize("held, rows", [(0, 16), (8191, 16), (8192, 32), (20_000, 63), (10**6, 63)])
def test_larger_steps_where_that_is_little(held, rows):
    assert TailBuffer(1, 1, 63, 8, True, CPU).rows_for(3, held) == rows


def numbered_like(batch: int, rows: int, head_dim: int) -> Tiles:
    tiles = numbered(batch, rows)
    return Tiles(*(x.repeat_interleave(head_dim // 8, -1) for x in (tiles.k8, tiles.v8)), tiles.k_scale, tiles.v_scale)


@pytest.mark.parametrize("rows", [3, 4, 7, 8])
def test_memory_of_another_size_holds_the_same(rows):
    buffer = TailBuffer(2, 2, 7, 8, True, CPU)
    buffer.take(numbered(2, 6), torch.tensor([1, 4]), torch.tensor([3, 2]), 0)
    (k8, v8), (k_scale, v_scale) = buffer.memory(rows)
    assert k8.is_contiguous()
    assert k8.shape == v8.shape == (2, 2, rows, 8)
    assert k8[:, 0, :, 0].tolist() == [[2, 3, 4] + [0] * (rows - 3), [15, 16] + [0] * (rows - 2)]
    assert (k_scale[0, 0, 2], v_scale[0, 0, 2]) == (4, 8)
    k8[0, 0, 2] = 9
    assert int(buffer.k8[0, 0, 2, 0]) == 9
    assert buffer.rows == min(rows, 7)
    assert buffer.memory(rows)[0][0].data_ptr() == k8.data_ptr()


def test_selecting_copies():
    buffer = TailBuffer(3, 2, 4, 8, True, CPU)
    buffer.take(numbered(3, 4), torch.zeros(3, dtype=torch.int64), torch.tensor([4, 3, 2]), 0)
    chosen = buffer.select(torch.tensor([2, 0, 2]))
    assert chosen.k8[:, 0, :, 0].tolist() == [[21, 22, 0, 0], [1, 2, 3, 4], [21, 22, 0, 0]]
    assert chosen.capacity == 4
    chosen.k8.zero_()
    assert buffer.k8[2, 0, 0, 0] == 21
    assert buffer.select(torch.zeros(0, dtype=torch.int64)).k8.shape == (0, 2, 4, 8)
