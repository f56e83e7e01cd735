"""``turboattention calibrate`` and ``inspect``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turboattention.calibration import Calibration
from turboattention.cli.heads_view import LEGEND, cells_of, summary, unusual_layers

from ..calibration.samples import calibration, layer
from .conftest import TEXT, Run

ONE_PIECE = ("--length", 192, "--tokens", 192)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    calibration(0.1, 0.4, 3.0).save(tmp_path / "kept")
    return tmp_path / "kept"


# -- calibrate -----------------------------------------------------------------------------------------


def test_a_file_that_caches_can_load(run: Run, model, text, tmp_path):
    out = tmp_path / "a" / "b"
    said = run("calibrate", "--model", model, "--text", text, *ONE_PIECE, "--out", out)
    assert said.code == 0, said.stderr
    assert "bits on average by error" in said.stdout
    assert "TurboCache(model.config, calibration=Calibration.load(" in said.stderr
    found = Calibration.load(out)
    assert found.provenance.model == str(model)
    assert (found.budget, found.strategy, found.means, found.provenance.tokens) == (3.0, "error", False, 192)
    assert len(found.layers) == 2
    assert found.k_order is not None
    halved = sum(int(order.halved.sum()) for order in found.k_order)
    assert f"With reorder_k, K of {halved} of 4 heads has two widths." in " ".join(said.stdout.split())


def test_json(run: Run, model, text, tmp_path):
    options = ("--bits", 2.5, "--strategy", "priority", "--means")
    got = run("calibrate", "--model", model, "--text", text, *ONE_PIECE, "--out", tmp_path, *options, "--json").json
    assert got["file"] == str(tmp_path / "calibration.json")
    assert (got["strategy"], got["budget"], got["means"]) == ("priority", 2.5, True)
    assert [(x["layer"], x["head"]) for x in got["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert got["heads"][0]["bits"] == Calibration.load(tmp_path).head_bits[0][:, 0].tolist()
    assert got["average_bits"] <= 2.5


@pytest.mark.parametrize(
    "options, message",
    [
        (("--bits", 1), "--bits: expected an average width from 2 to 8, got 1"),
        (("--bits", "nan"), "--bits: expected an average width from 2 to 8, got nan"),
        (("--model", " "), "--model: expected a folder or a name such as org/model, got ' '"),
        (("--text", "none.txt"), "--text: none.txt cannot be read: No such file or directory"),
        (("--length", 64), "--length: expected at least 192 tokens, got 64"),
        (("--tokens", 100), "--tokens: expected at least 192 tokens, got 100"),
    ],
)
def test_refusals(run: Run, model, text, tmp_path, options, message):
    given = {"--model": model, "--text": text} | dict([options])
    line = run("calibrate", *(x for pair in given.items() for x in pair), "--out", tmp_path, "--json").error
    assert line == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
def test_what_needs_no_weights(run: Run, model, tmp_path):
    """Texts that are too short are named by the option that each command has for them."""
    (tmp_path / "short.txt").write_text("Too short.")
    for command, option in ((("calibrate", "--out", tmp_path), "--text"), (("inspect",), "--file")):
        error = run(*command, "--model", model, option, tmp_path / "short.txt").error
        assert error.startswith(f"{option}: expected at least 192 tokens, got ")
        assert run(*command, "--model", model, "--length", 64).error.startswith("--length: expected at least 192")


def test_a_file_in_the_way(run: Run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out: expected a folder, got the file" in run("calibrate", "--out", tmp_path / "file").error


def test_short_texts_are_said_to_measure_badly(run: Run, model, text, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT * 3)
    said = run("calibrate", "--model", model, "--text", tmp_path / "short.txt", "--out", tmp_path)
    assert "warning: the text has" in said.stderr


# -- inspect -------------------------------------------------------------------------------------------


def test_every_head_of_a_model(run: Run, model, text):
    got = run("inspect", "--model", model, "--file", text, *ONE_PIECE, "--json").json
    assert len(got["heads"]) == 4
    for head in got["heads"]:
        assert len(head["errors"]) == len(head["costs"]) == 2
        assert all(len(row) == len(got["widths"]) == 4 for row in head["errors"] + head["costs"])
        assert 0 < head["error"] < 1
    assert got["expected_kl"] == pytest.approx(sum(head["cost"] for head in got["heads"]))


def test_a_table_of_what_was_kept(run: Run, saved):
    said = run("inspect", "--calibration", saved, columns=80).stdout
    made = Calibration.load(saved)
    lines = [line.split() for line in said.splitlines()]
    for cells in cells_of(made):
        assert [part for cell in cells for part in cell.split()] in lines
    assert " ".join(LEGEND.split())[:60] in " ".join(said.split())
    assert " ".join(summary(made).split()) in " ".join(said.split())


def test_other_widths_for_what_was_kept(run: Run, saved):
    same = run("inspect", "--calibration", saved, "--json").json
    more = run("inspect", "--calibration", saved, "--bits", 6, "--json").json
    theirs = run("inspect", "--calibration", saved, "--strategy", "priority", "--json").json
    assert same["average_bits"] < more["average_bits"] <= 6
    assert more["expected_kl"] < same["expected_kl"]
    assert (theirs["strategy"], theirs["budget"]) == ("priority", 3.0)


def test_heads_beyond_their_bound_are_named():
    made = calibration(0.1, 0.4)
    assert "Beyond" not in summary(made)
    narrow = torch.full((2, 2), 2)
    bad = Calibration((layer(0.1), layer(0.9)), made.provenance, (narrow, narrow), 2.0, "error")
    assert summary(bad).endswith("Beyond their bound (layer.head): 1.0.")


def test_a_page(run: Run, saved, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "heads.html"
    said = run("inspect", "--calibration", saved, "--html", page)
    assert said.code == 0, said.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.count("data:image/svg+xml;base64,") == 6
    assert "some/model" in text
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("<tr") == 1 + 6
    # The worst head, in red or bold, is the one beyond its bound.
    assert text.count('class="strong"') == sum(x["error"] > x["bound"] for x in _json(run, saved)["heads"])


def _json(run: Run, saved: Path):
    return run("inspect", "--calibration", saved, "--json").json


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "m"), "--calibration: expected no --model or --file with it: it holds what was measured of them"),
        (("--bits", 9), "--bits: expected an average width from 2 to 8 bits, got 9.0"),
        (("--html", "no/such/page.html"), "--html: no/such/page.html cannot be written: there is no folder no/such"),
    ],
)
def test_inspect_refuses(run: Run, saved, options, message):
    assert run("inspect", "--calibration", saved, *options).error == message


def test_no_calibration(run: Run, tmp_path):
    assert run("inspect", "--calibration", tmp_path).error.startswith("--calibration: expected a calibration, ")


# -- generate ------------------------------------------------------------------------------------------


def test_generate_takes_its_widths(run: Run, model, text, tmp_path):
    assert run("calibrate", "--model", model, "--text", text, *ONE_PIECE, "--out", tmp_path).code == 0
    prompt = ("--model", model, "--prompt", TEXT * 3, "--max-new-tokens", 2)
    made = [Calibration.load(tmp_path).rechosen(bits) for bits in (2.0, 8.0)]
    sizes = []
    for calibration_of in made:
        calibration_of.save(tmp_path)
        said = run("generate", *prompt, "--calibration", tmp_path, "--compare", "--json").json
        (setting,) = said["settings"]
        sizes.append(setting["kv_bytes"])
    assert sizes[0] < sizes[1]


def test_generate_refuses_another_models(run: Run, model, saved):
    said = run("generate", "--model", model, "--prompt", "x", "--calibration", saved, "--max-new-tokens", 1)
    assert "error: " in said.stderr
    assert run("generate", "--prompt", "x", "--calibration", saved / "none").error.startswith(
        "--calibration: expected a"
    )


def test_a_layer_that_stands_out_is_named(run: Run, tmp_path):
    """Also in the picture, which is a picture."""
    found = calibration(0.1, 0.1, 0.1, 0.1)
    assert unusual_layers(found) == {}
    found.layers[2].errors[0, :, -1] *= 30
    assert list(unusual_layers(found)) == [2]
    assert "Unusual: layer 2: K at 8 bits loses" in summary(found)
    found.save(tmp_path / "kept")
    said = run("inspect", "--calibration", tmp_path / "kept", "--picture", tmp_path / "keys.png")
    assert "Unusual: layer 2" in " ".join(said.stdout.split())
    assert (tmp_path / "keys.png").read_bytes().startswith(b"\x89PNG")
    refused = run("inspect", "--calibration", tmp_path / "kept", "--picture", tmp_path / "keys.doc").error
    assert refused.startswith("--picture: expected a file named .png, .svg, .pdf, got ")
