"""The environment variable and the section of ``--additional-config``."""

from __future__ import annotations

import pytest

from turboattention.errors import ConfigError
from turboattention.integrations.vllm.settings import Settings, parse_variable


@pytest.mark.parametrize("text", [None, "", " ", "0", "off", "False", "no"])
def test_inert(text: str | None) -> None:
    assert parse_variable(text) is None


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1", Settings()),
        ("on", Settings()),
        ("4", Settings(bits=4)),
        ("3", Settings(bits=3)),
        ("2", Settings(bits=2)),
        ("8", Settings(bits=8)),
        ("mixed", Settings(bits="mixed")),
    ],
)
def test_variable(text: str, wanted: Settings) -> None:
    assert parse_variable(text) == wanted


def test_variable_names_a_folder(tmp_path) -> None:
    assert parse_variable(str(tmp_path)) == Settings(calibration=str(tmp_path))
    assert parse_variable(str(tmp_path)).calibrated_widths


@pytest.mark.parametrize("text", ["5", "16", "int4", "/no/such/folder"])
def test_other_values_of_the_variable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"TURBOATTENTION_VLLM: expected 1, a width of 2, 3, 4, 8, .* got '"):
        parse_variable(text)


def test_the_section_wins() -> None:
    assert Settings.resolve("4", {"turboattention": {"bits": 3, "guard": False}}) == Settings(bits=3, guard=False)
    assert Settings.resolve("3", {"other": 1}) == Settings(bits=3)
    assert Settings.resolve("3", None) == Settings(bits=3)
    assert Settings.resolve("1", {"turboattention": {"bits": [4, 3]}}).bits == (4, 3)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"bits": 5}, "bits: expected 8, 4, 3, 2"),
        ({"bits": [4]}, "bits: expected 8, 4, 3, 2"),
        ({"bit": 4}, "expected bits, calibration, guard, reorder_k, got 'bit'"),
        ({"reorder_k": 1}, "expected true or false as reorder_k, got 1"),
        ({"calibration": 3}, "expected a folder as calibration, got 3"),
        ({"guard": "warn"}, "expected true or false as guard, got 'warn'"),
        (4, "expected a JSON object, got 4"),
        ({"bits": "mixed"}, 'bits: "mixed" needs a calibration in vLLM'),
    ],
)
def test_sections_refused(section: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.resolve("1", {"turboattention": section})


def test_whose_widths() -> None:
    assert not Settings().calibrated_widths
    assert Settings(calibration="x").calibrated_widths
    assert Settings(calibration="x", bits="mixed").calibrated_widths
    assert not Settings(calibration="x", bits=3).calibrated_widths
