from __future__ import annotations

import pytest

from turboattention import TurboConfig
from turboattention.cli.settings import Guard, Preset, make_setting, parse_bits
from turboattention.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("8", 8),
        ("4", 4),
        (" 3 ", 3),
        ("2", 2),
        ("mixed", "mixed"),
        ("MIXED", "mixed"),
        ("4,3", (4, 3)),
        ("8, 2", (8, 2)),
    ],
)
def test_bits(text: str, bits: object) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "5", "16", "4,", ",4", "4,3,2", "four", "4.0", "-4", "4,5", "mixed,4", "²"])
def test_bits_that_there_are_not(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--bits: expected 8, 4, 3, 2, mixed, or two widths .* got"):
        parse_bits(text)


def test_the_default_setting_reorders_keys() -> None:
    setting = make_setting("4")
    assert (setting.config, setting.label) == (TurboConfig(reorder_k=True), "4 bits")


def test_paper() -> None:
    setting = make_setting("mixed", Preset.paper)
    assert (setting.config, setting.label) == (TurboConfig.paper(bits="mixed"), "paper mixed")


def test_guard_overrides_the_preset() -> None:
    assert make_setting("4", Preset.paper, Guard.warn).config == TurboConfig.paper(bits=4, guard="warn")


def test_pairs_have_a_name() -> None:
    assert make_setting("4,3").label == "K4 V3"
