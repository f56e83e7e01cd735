"""`TurboConfig`: its two presets, and that values out of range are refused by name."""

from __future__ import annotations

import dataclasses
import re

import pytest

import turboattention as ta
from turboattention.errors import ConfigError

DEFAULTS = {
    "bits": 4,
    "block_size": 64,
    "softmax": "auto",
    "sas_threshold": -9.0,
    "row_max": "block",
    "p_scale": "row",
    "rescale": "exact",
    "smooth_k": True,
    "rotate": True,
    "reorder_k": False,
    "token_scales": True,
    "sink_tokens": 64,
    "exact_rows": 16,
    "search": True,
    "low_bit_fraction": 0.5,
    "stored_prefill": False,
    "guard": "adapt",
    "flush_lag": 0,
}
PAPER = {
    "softmax": "sas",
    "sas_threshold": -6.0,
    "row_max": "running",
    "p_scale": "tile",
    "rescale": "sas",
    "smooth_k": False,
    "rotate": False,
    "token_scales": False,
    "sink_tokens": 0,
    "exact_rows": 0,
    "search": False,
    "guard": "off",
}


def test_defaults():
    assert dataclasses.asdict(ta.TurboConfig()) == DEFAULTS


def test_paper_preset():
    assert dataclasses.asdict(ta.TurboConfig.paper()) == DEFAULTS | PAPER


def test_paper_takes_overrides():
    config = ta.TurboConfig.paper(bits="mixed", rescale="exact")
    assert dataclasses.asdict(config) == DEFAULTS | PAPER | {"bits": "mixed", "rescale": "exact"}


VALID = [
    ("bits", 8), ("bits", 4), ("bits", 3), ("bits", 2), ("bits", (4, 2)), ("bits", (2, 8)), ("bits", "mixed"),
    ("block_size", 16), ("block_size", 32), ("block_size", 64),
    ("softmax", "sas"), ("softmax", "sas2"), ("softmax", "exp"), ("sas_threshold", -80), ("sas_threshold", -0.5),
    ("exact_rows", 0), ("exact_rows", 1),
    ("sink_tokens", 0), ("sink_tokens", 128), ("low_bit_fraction", 0), ("low_bit_fraction", 1.0),
    ("flush_lag", 0), ("flush_lag", 200), ("guard", "warn"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", VALID)
def test_accepted(name, value):
    config = ta.TurboConfig(**{name: value})
    assert dataclasses.asdict(config) == DEFAULTS | {name: value}


INVALID = [
    ("bits", 5), ("bits", 0), ("bits", 4.0), ("bits", True), ("bits", "4"), ("bits", "half"), ("bits", None),
    ("bits", (4,)), ("bits", (4, 2, 2)), ("bits", (4, 5)), ("bits", [4, 2]), ("bits", ("mixed", 4)),
    ("block_size", 0), ("block_size", 8), ("block_size", 24), ("block_size", 272), ("block_size", -64),
    ("block_size", 64.0), ("block_size", "64"),
    ("softmax", "softmax"), ("softmax", None), ("row_max", "tile"), ("p_scale", "block"), ("rescale", "sas2"),
    ("guard", True), ("guard", "on"),
    ("sas_threshold", 0), ("sas_threshold", 6.0), ("sas_threshold", -80.5), ("sas_threshold", float("nan")),
    ("sas_threshold", "-6"), ("sas_threshold", None),
    ("smooth_k", 1), ("rotate", None), ("token_scales", "yes"), ("search", 0), ("stored_prefill", "off"),
    ("sink_tokens", 32), ("sink_tokens", -64), ("sink_tokens", 64.0), ("sink_tokens", True),
    ("low_bit_fraction", -0.1), ("low_bit_fraction", 1.1), ("low_bit_fraction", None), ("low_bit_fraction", "1"),
    ("flush_lag", -1), ("flush_lag", 1.5), ("flush_lag", False),
]  # fmt: skip


@pytest.mark.parametrize("name, value", INVALID)
def test_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .+, got {re.escape(repr(value))}$"):
        ta.TurboConfig(**{name: value})


def test_sinks_follow_the_block_size():
    assert ta.TurboConfig(block_size=32, sink_tokens=32).sink_tokens == 32
    assert ta.TurboConfig(block_size=128).sink_tokens == 128  # the default, rounded up
    with pytest.raises(ConfigError, match=r"^sink_tokens: expected 0 or a multiple of block_size \(128\), got 96$"):
        ta.TurboConfig(block_size=128, sink_tokens=96)


def test_stored_prefill_excludes_a_lag():
    """Blocks that are complete are then stored; with a lag they are not yet."""
    with pytest.raises(ConfigError, match=r"^flush_lag: expected 0 with stored_prefill, got 4$"):
        ta.TurboConfig(stored_prefill=True, flush_lag=4)


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="sinks"):
        ta.TurboConfig(sinks=64)


def test_frozen_equal_and_hashable():
    config = ta.TurboConfig(bits=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4
    assert config == ta.TurboConfig(bits=3) != ta.TurboConfig()
    assert len({config, ta.TurboConfig(bits=3), ta.TurboConfig()}) == 2


def test_replace_checks_too():
    config = ta.TurboConfig(bits=3)
    assert config.replace(bits=2) == ta.TurboConfig(bits=2)
    assert config.bits == 3
    with pytest.raises(ConfigError, match=r"^bits: "):
        config.replace(bits=7)


@pytest.mark.parametrize("bits, pair", [(4, (4, 4)), (3, (3, 3)), ((4, 2), (4, 2)), ("mixed", (4, 4))])
def test_widths_of_keys_and_values(bits, pair):
    assert ta.TurboConfig(bits=bits).kv_bits == pair
