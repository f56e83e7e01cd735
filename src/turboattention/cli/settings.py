"""Converts ``--bits``, ``--preset`` and ``--guard`` to named configurations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import WIDTHS, Bits, TurboConfig
from ..errors import ConfigError
from .naming import named

if TYPE_CHECKING:
    from ..calibration import Calibration


class Preset(str, Enum):
    default = "default"
    paper = "paper"


class Guard(str, Enum):
    adapt = "adapt"
    warn = "warn"
    off = "off"


@dataclass(frozen=True)
class Setting:
    """A configuration, its bits as typed, its label in tables, and its calibration."""

    bits: str
    label: str
    config: TurboConfig
    calibration: Calibration | None = None


def load_calibration(folder: Path | None) -> Calibration | None:
    """Load a calibration. Raises InputError, FormatError."""
    if folder is None:
        return None
    from ..calibration import Calibration

    with named(path="--calibration"):
        return Calibration.load(folder)


def make_setting(
    bits: str,
    preset: Preset = Preset.default,
    guard: Guard | None = None,
    calibration: Calibration | None = None,
) -> Setting:
    """The default preset reorders the channels of K: a command runs one sequence, or copies of one, so that no other
    sequence can have decided the order. Raises ConfigError for invalid bits."""
    make = TurboConfig.paper if preset is Preset.paper else TurboConfig
    widths = parse_bits(bits)
    config = make(bits=widths) if guard is None else make(bits=widths, guard=guard.value)
    if preset is Preset.default:
        config = reordered(config)
    label = bits_label(widths)
    if widths == "mixed" and calibration is not None:
        label = "measured"
    return Setting(bits, f"paper {label}" if preset is Preset.paper else label, config, calibration)


def reordered(config: TurboConfig) -> TurboConfig:
    """The configuration with the channels of K reordered, where K has 4, 3 or 2 bits and widths are not "mixed"."""
    return config.replace(reorder_k=config.bits != "mixed" and config.kv_bits[0] < 8)


def parse_bits(text: str) -> Bits:
    """ "4" -> 4, "4,3" -> (4, 3), "mixed" -> "mixed"."""
    if text.strip().lower() == "mixed":
        return "mixed"
    parts = text.split(",")
    widths = [int(part) for part in parts if part.strip().isdecimal() and int(part) in WIDTHS]
    if len(widths) != len(parts) or len(parts) > 2:
        raise ConfigError(f"--bits: expected 8, 4, 3, 2, mixed, or two widths for K,V such as 4,3; got {text!r}")
    return widths[0] if len(widths) == 1 else (widths[0], widths[1])


def bits_label(bits: Bits) -> str:
    if bits == "mixed":
        return "mixed"
    return f"K{bits[0]} V{bits[1]}" if isinstance(bits, tuple) else f"{bits} bits"
