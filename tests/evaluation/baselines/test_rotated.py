"""SAW-INT4 and KVarN: Hadamard blocks, variance normalization, tiles."""

from __future__ import annotations

import pytest
import torch

from turboattention.evaluation.baselines.groups import min_max
from turboattention.evaluation.baselines.hadamard import rotate_blocks
from turboattention.evaluation.baselines.kvarn import KVarN, normalize, quantize_rows
from turboattention.evaluation.baselines.saw_int4 import RotatedPerToken


def test_rotation_by_hand() -> None:
    assert rotate_blocks(torch.tensor([3.0, 1.0, 1.0, 1.0]), 4).tolist() == [3.0, 1.0, 1.0, 1.0]
    half = 2**-0.5
    torch.testing.assert_close(
        rotate_blocks(torch.tensor([3.0, 1.0, 0.0, 1.0]), 2), half * torch.tensor([4.0, 2.0, 1.0, -1.0])
    )


@pytest.mark.parametrize("head_dim, order", [(64, 128), (96, 128), (128, 16), (40, 8)])
def test_rotation_is_its_own_inverse_and_keeps_lengths(head_dim: int, order: int) -> None:
    x = torch.randn(3, head_dim, dtype=torch.float64)
    y = rotate_blocks(x, order)
    torch.testing.assert_close(rotate_blocks(y, order), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_saw_is_int4_of_the_rotated_token() -> None:
    x = torch.randn(1, 2, 7, 64)
    values, bits = RotatedPerToken()(x, 0)
    torch.testing.assert_close(rotate_blocks(values, 64), min_max(rotate_blocks(x, 64), 4, -1).values)
    assert bits / x.numel() == 4.5  # 4.25 at head_dim 128
    assert RotatedPerToken()(torch.randn(1, 1, 3, 128), 0).bits == 3 * 128 * 4.25


def test_saw_spreads_an_outlier() -> None:
    x = torch.zeros(1, 1, 1, 64)
    x[..., 5] = 8.0  # after rotation every channel is 1 or -1, the ends of the range
    torch.testing.assert_close(RotatedPerToken()(x, 0).values, x, rtol=0, atol=0.01)


def test_normalization_by_hand() -> None:
    # Columns (1, 3) and (-1, -3) deviate by sqrt 2; then the rows by 1 and 3; then all is even.
    tile = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    row, column = normalize(tile, 1)
    torch.testing.assert_close(row, torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(column, torch.full((1, 2), 2**0.5))


def test_normalization_keeps_the_most_even_round() -> None:
    tile = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    for rounds in (0, 1, 16):
        row, column = normalize(tile, rounds)
        assert torch.stack([row.flatten(), column.flatten()]).isfinite().all()
    assert torch.equal(torch.cat([x.flatten() for x in normalize(tile, 0)]), torch.ones(4))


def test_normalization_takes_large_rows_and_columns_back() -> None:
    tile = torch.randn(64, 128)
    tile[5] *= 10
    tile[:, 7] *= 20
    row, column = normalize(tile, 16)
    even = tile / row / column
    for dim in (0, 1):
        assert tile.std(dim).max() / tile.std(dim).min() > 8
        assert even.std(dim).max() / even.std(dim).min() < 1.5


def test_rows_by_hand() -> None:
    tile = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    values, bits = quantize_rows(tile, 2, 1)
    torch.testing.assert_close(values, tile, rtol=2e-3, atol=0)
    assert bits == 2 * 4 + 16 * (2 + 2 + 2)


def test_kvarn_keeps_sinks_and_quantizes_full_tiles() -> None:
    x = torch.randn(1, 2, 384, 64)
    quantizer = KVarN("channel", 4)
    assert [quantizer.settled(n) for n in (127, 128, 500)] == [0, 128, 384]
    values, bits = quantizer(x, 0)
    assert torch.equal(values[:, :, :128], x[:, :, :128])
    assert not torch.equal(values[:, :, 128:], x[:, :, 128:])
    assert bits == 16 * 2 * 128 * 64 + quantizer(x[:, :, 128:], 128).bits
    torch.testing.assert_close(values[:, :, 128:], quantizer(x[:, :, 128:], 128).values)


def test_kvarn_rows_are_channels_of_keys_and_tokens_of_values() -> None:
    x = torch.randn(1, 1, 128, 64)
    turned = rotate_blocks(x, 64)
    keys, values = KVarN("channel", 2)(x, 128), KVarN("token", 2)(x, 128)
    torch.testing.assert_close(rotate_blocks(keys.values, 64).mT, quantize_rows(turned.mT, 2, 16).values)
    torch.testing.assert_close(rotate_blocks(values.values, 64), quantize_rows(turned, 2, 16).values)


def test_kvarn_tile_takes_the_bytes_of_the_published_record() -> None:
    x = torch.randn(1, 1, 128, 128)
    keys, values = KVarN("channel", 2)(x, 128), KVarN("token", 2)(x, 128)
    assert keys.bits // 8 == 4096 + 768
    assert (keys.bits + values.bits) // 8 == 9728
