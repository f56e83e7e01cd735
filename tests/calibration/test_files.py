"""Calibrations as files, and what follows from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from turboattention.calibration import Calibration
from turboattention.errors import ConfigError, FormatError, InputError
from turboattention.guard import BOUNDS

from .samples import calibration


def same(a: Calibration, b: Calibration) -> None:
    for one, other in zip(a.layers, b.layers, strict=True):
        for name in ("errors", "costs", "priority", "k_mean", "k_weight"):
            x, y = getattr(one, name), getattr(other, name)
            assert x.dtype == y.dtype
            assert torch.allclose(x, y, rtol=1e-5, atol=0)
        assert one.outliers == other.outliers
    assert [x.tolist() for x in a.head_bits] == [x.tolist() for x in b.head_bits]
    for name in ("provenance", "budget", "strategy", "means", "bounds"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("options", [{}, {"budget": 3.5, "means": True}, {"strategy": "priority"}])
def test_there_and_back(tmp_path, options):
    made = calibration(**options)
    made.save(tmp_path / "new" / "folder")
    same(made, Calibration.load(tmp_path / "new" / "folder"))
    same(made, Calibration.load(tmp_path / "new" / "folder" / "calibration.json"))
    assert [x.name for x in (tmp_path / "new" / "folder").iterdir()] == ["calibration.json"]


def test_a_second_one_takes_its_place(tmp_path):
    calibration(budget=4).save(tmp_path)
    calibration(budget=2.5).save(tmp_path)
    assert Calibration.load(tmp_path).budget == 2.5


def changed(tmp_path: Path, change) -> Path:
    calibration().save(tmp_path)
    file = tmp_path / "calibration.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("layers"),
        lambda c: c.update(layers=[]),
        lambda c: c.update(layers=7),
        lambda c: c.update(widths=[2, 4, 8]),
        lambda c: c.update(strategy="best"),
        lambda c: c["provenance"].pop("model"),
        lambda c: c["layers"][1].pop("costs"),
        lambda c: c["layers"][1].update(errors=[[1.0]]),
        lambda c: c["layers"][0]["priority"][0].append(1.0),
        lambda c: c["layers"][0]["costs"][0][0].__setitem__(0, None),
        lambda c: c["layers"][0]["costs"][0][0].__setitem__(0, float("nan")),
        lambda c: c["layers"][0]["head_bits"][0].__setitem__(0, 5),
        lambda c: c["layers"][0].update(head_bits=None),
        lambda c: c["layers"][0]["k_weight"].pop(),
        lambda c: c["layers"][0]["k_weight"][0].pop(),
        lambda c: c["layers"][0]["k_weight"][0].__setitem__(0, -1.0),
        lambda c: c.update(budget=None),
        lambda c: c["layers"][0].update(outliers=[[float("inf")], []]),
    ],
)
def test_damaged_files_are_refused(tmp_path, change):
    file = changed(tmp_path, change)
    with pytest.raises(FormatError, match=r"path: expected a calibration, got a damaged one: .*calibration\.json \("):
        Calibration.load(file)


def test_files_of_version_1_have_no_orders(tmp_path):
    def older(content):
        content.update(version=1)
        for each in content["layers"]:
            del each["k_weight"]

    read = Calibration.load(changed(tmp_path, older))
    assert [each.k_weight for each in read.layers] == [None, None]
    assert read.k_order is None
    assert [x.tolist() for x in read.head_bits] == [x.tolist() for x in calibration().head_bits]
    read.save(tmp_path)
    assert Calibration.load(tmp_path).k_order is None


def test_foreign_files_are_refused(tmp_path):
    file = changed(tmp_path, lambda c: c.update(version=3))
    with pytest.raises(FormatError, match="path: expected version 1 or 2 of a calibration, got 3 in"):
        Calibration.load(file)
    for content in ("[]", "{}", "7", '{"format": "other"}'):
        file.write_text(content)
        with pytest.raises(FormatError, match="path: expected a calibration, got another kind of file"):
            Calibration.load(file)
    for data in (b"{", b"\xff\xfe", b""):
        file.write_bytes(data)
        with pytest.raises(FormatError, match="which is not JSON"):
            Calibration.load(file)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"path: expected a calibration, '.*none' cannot be read: No such file"):
        Calibration.load(tmp_path / "none")
    with pytest.raises(InputError, match=r"path: expected a calibration, .*calibration\.json' cannot be read"):
        Calibration.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder: .* cannot be written"):
        calibration().save(tmp_path / "file")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "calibration.json")
    for path in (tmp_path / "calibration.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=r"path: expected a calibration, .* cannot be read: it is a folder"):
            Calibration.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_a_file_that_is_nested_too_deeply(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(FormatError, match="which is not JSON"):
        Calibration.load(tmp_path / "file")


def test_a_calibration_that_cannot_be_written_leaves_no_folder(tmp_path, file_limit):
    with file_limit(100), pytest.raises(InputError, match=r"folder: .* cannot be written: .*File too large"):
        calibration().save(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []


def test_orders_follow_from_the_weights(tmp_path):
    made = calibration()
    made.save(tmp_path)
    for orders in (made.k_order, Calibration.load(tmp_path).k_order):
        assert orders is not None
        for order in orders:
            assert order.permutation.tolist() == [[*range(8, 16), *range(8)]] * 2
            # The weights of the second head, 16^2 to 31^2, are more alike.
            assert order.halved.tolist() == [True, False]


# -- what was chosen -----------------------------------------------------------------------------------


def test_the_layer_that_errs_more_gets_more():
    made = calibration(0.05, 0.4)
    assert made.average_bits == 3.0
    assert int(made.head_bits[0].sum()) < int(made.head_bits[1].sum())
    assert (made.strategy, made.budget, made.bounds) == ("error", 3.0, BOUNDS)


def test_bounds_come_before_the_budget():
    made = calibration(1.6, budget=2.0)
    assert made.average_bits > 2.0
    assert bool((made.chosen_errors[0] <= torch.tensor([BOUNDS[int(b)] for b in made.head_bits[0].amin(0)])).all())


def test_rechosen():
    made = calibration(means=True)
    other = made.rechosen(4.0, "priority")
    assert other.average_bits == 4.0
    assert (other.budget, other.strategy, other.means) == (4.0, "priority", True)
    assert other.layers is made.layers
    assert made.rechosen(3.0, means=False).k_mean is None


def test_means_are_given_where_wanted():
    assert calibration().k_mean is None
    means = calibration(means=True).k_mean
    assert means is not None
    assert torch.equal(means[1], calibration().layers[1].k_mean)


def test_another_models_shape():
    made = calibration()
    made.check_shape({"head_dim": 16, "vocab_size": 5})
    with pytest.raises(ConfigError, match=r"calibration: .* \(head_dim=32\), got one of some/model \(head_dim=16\)"):
        made.check_shape({"head_dim": 32})
