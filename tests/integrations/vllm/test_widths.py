"""Widths, means and page sizes per layer and rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turboattention.calibration import Calibration, LayerStatistics, Provenance
from turboattention.errors import ConfigError
from turboattention.integrations.vllm.settings import Settings
from turboattention.integrations.vllm.widths import Rank, Widths
from turboattention.kv.layout import PageLayout

CPU = torch.device("cpu")
D = 16
BITS = [[[8, 4, 3, 2], [4, 4, 2, 2]], [[2, 2, 2, 4], [3, 3, 8, 8]]]


def calibrated(folder: Path, means: bool = True, orders: bool = True, **settings) -> Widths:
    generator = torch.Generator().manual_seed(0)
    layers = tuple(
        LayerStatistics(
            errors=torch.zeros(2, 4, 4, dtype=torch.float64),
            costs=torch.zeros(2, 4, 4, dtype=torch.float64),
            priority=torch.zeros(2, 4, dtype=torch.float64),
            k_mean=torch.randn(4, D, generator=generator).mul(1000).round(),
            outliers=((),) * 4,
            k_weight=torch.logspace(0, 3, 4 * D).reshape(4, D).double() if orders else None,
        )
        for _ in BITS
    )
    provenance = Provenance("model", "hash", {"num_hidden_layers": 2}, "text", 1, 1, "0")
    Calibration(layers, provenance, tuple(torch.tensor(b) for b in BITS), 3.0, "error", means).save(folder)
    return Widths(Settings(calibration=str(folder), **settings))


def bytes_of(k: list[int], v: list[int]) -> int:
    return -(-PageLayout(D, 64, tuple(k), tuple(v), True).page_bytes // 64) * 64


@pytest.mark.parametrize("bits, wanted", [(None, (4, 4)), (3, (3, 3)), ((4, 2), (4, 2))])
def test_one_width_everywhere(bits, wanted) -> None:
    widths = Widths(Settings(bits=bits))
    assert widths.head_bits(7, Rank(1, 2, 3)) == ((wanted[0],) * 3, (wanted[1],) * 3)
    assert widths.mean(7, Rank(1, 2, 3)) is None
    assert widths.page_bytes(3, D) == bytes_of([wanted[0]] * 3, [wanted[1]] * 3)
    assert not widths.config.smooth_k
    assert widths.format(7, Rank(1, 2, 3), D, CPU).layouts[0].num_kv_heads == 3


def test_calibrated_widths_and_means_of_a_rank(tmp_path) -> None:
    widths = calibrated(tmp_path)
    assert widths.head_bits(0, Rank(0, 1, 4)) == ((8, 4, 3, 2), (4, 4, 2, 2))
    assert widths.head_bits(0, Rank(1, 2, 2)) == ((3, 2), (2, 2))
    assert widths.head_bits(1, Rank(0, 2, 2)) == ((2, 2), (3, 3))
    # Eight ranks share four heads.
    assert widths.head_bits(0, Rank(5, 8, 1)) == ((3,), (2,))
    mean = widths.mean(1, Rank(1, 2, 2))
    assert mean is not None
    assert torch.equal(mean, widths.calibration.layers[1].k_mean[2:])
    assert widths.config.smooth_k


def test_every_rank_reserves_the_largest_page(tmp_path) -> None:
    widths = calibrated(tmp_path)
    assert widths.page_bytes(4, D) == max(bytes_of(*bits) for bits in BITS)
    assert widths.page_bytes(2, D) == max(bytes_of(k[i : i + 2], v[i : i + 2]) for k, v in BITS for i in (0, 2))
    assert widths.format(0, Rank(1, 2, 2), D, CPU).page_bytes == widths.page_bytes(2, D)


def test_means_are_left_out_where_the_calibration_does(tmp_path) -> None:
    widths = calibrated(tmp_path, means=False)
    assert widths.mean(0, Rank(0, 1, 4)) is None
    assert not widths.config.smooth_k


def test_calibrated_means_with_one_width(tmp_path) -> None:
    calibrated(tmp_path)
    widths = Widths(Settings(calibration=str(tmp_path), bits=3))
    assert widths.head_bits(0, Rank(1, 2, 2)) == ((3, 3), (3, 3))
    assert widths.mean(0, Rank(1, 2, 2)) is not None


def test_a_calibration_of_other_layers_or_heads(tmp_path) -> None:
    widths = calibrated(tmp_path)
    with pytest.raises(ConfigError, match="calibration: expected one with layer 2, got 2 layers"):
        widths.head_bits(2, Rank(0, 1, 4))
    with pytest.raises(ConfigError, match="calibration: expected 8 KV heads per rank in layer 0, got 4 in all"):
        widths.head_bits(0, Rank(0, 1, 8))


def test_calibrated_orders_of_a_rank(tmp_path, caplog) -> None:
    widths = calibrated(tmp_path, bits=3, reorder_k=True)
    assert widths.config.reorder_k
    found = widths.format(1, Rank(1, 2, 2), D, CPU)
    (order,) = found.orders
    assert order.permutation.tolist() == [[*range(D // 2, D), *range(D // 2)]] * 2
    assert widths.order(1, Rank(0, 1, 4)).of_heads(slice(2, 4)).halved.tolist() == order.halved.tolist()
    # No larger than pages of one width per head.
    assert found.page_bytes == calibrated(tmp_path, bits=3).format(1, Rank(1, 2, 2), D, CPU).page_bytes
    assert not caplog.records


def test_orders_are_taken_only_if_asked_for(tmp_path) -> None:
    widths = calibrated(tmp_path, bits=3)
    assert not widths.config.reorder_k
    assert widths.format(0, Rank(0, 1, 4), D, CPU).orders == ()


@pytest.mark.parametrize("given", [True, False], ids=["version 1", "no calibration"])
def test_a_server_without_orders_says_once_what_it_loses(tmp_path, caplog, given) -> None:
    widths = calibrated(tmp_path, orders=False, reorder_k=True) if given else Widths(Settings(bits=3, reorder_k=True))
    for layer in (0, 1, 0):
        assert widths.format(layer, Rank(0, 1, 4), D, CPU).orders == ()
        assert not widths.config.reorder_k
    (said,) = [record.getMessage() for record in caplog.records]
    got = f"{tmp_path}, which has none" if given else "no calibration"
    assert said.startswith("reorder_k: expected a calibration with orders of K's channels (turboattention calibrate ")
    assert f"got {got}: keys are stored with one width per head" in said


def test_keys_of_8_bits_need_no_orders(caplog) -> None:
    widths = Widths(Settings(bits=8, reorder_k=True))
    assert not widths.config.reorder_k
    assert widths.format(0, Rank(0, 1, 4), D, CPU).orders == ()
    assert not caplog.records
