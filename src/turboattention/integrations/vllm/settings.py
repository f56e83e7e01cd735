"""Settings of the plugin: an environment variable, which activates it, and vLLM's ``--additional-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config import WIDTHS, Bits, TurboConfig
from ...errors import ConfigError

VARIABLE = "TURBOATTENTION_VLLM"
SECTION = "turboattention"

_OFF = ("", "0", "false", "no", "off")
_ON = ("1", "true", "yes", "on")
_KEYS = ("bits", "calibration", "guard")


@dataclass(frozen=True)
class Settings:
    """The storage settings of a server, fixed at startup.

    bits: as in `TurboConfig.bits`. None: the calibration's widths per head (like ``"mixed"``), or 4 without one.
    calibration: a folder written by `turboattention calibrate`, or None.
    guard: whether attention over the first prompt is compared with exact attention in every layer.
    """

    bits: Bits | None = None
    calibration: str | None = None
    guard: bool = True

    @classmethod
    def resolve(cls, variable: str | None, additional: Mapping[str, Any] | None) -> Settings:
        """From the environment variable and ``--additional-config``, which takes precedence.

        Raises:
            ConfigError: a value out of range, an unknown name, or ``"mixed"`` without a calibration.
        """
        settings = parse_variable(variable) or cls()
        settings = settings._with((additional or {}).get(SECTION, {}))
        if settings.bits == "mixed" and settings.calibration is None:
            raise ConfigError(
                'bits: "mixed" needs a calibration in vLLM, where widths are fixed before the first prompt; '
                f'got none (--additional-config \'{{"{SECTION}": {{"calibration": "FOLDER"}}}}\')'
            )
        return settings

    @property
    def calibrated_widths(self) -> bool:
        """Whether each head has the width that the calibration chose for it."""
        return self.calibration is not None and self.bits in (None, "mixed")

    @property
    def name(self) -> str:
        """The name in log messages."""
        return f"widths of {self.calibration}" if self.calibrated_widths else f"{self.bits or 4} bits"

    def _with(self, section: object) -> Settings:
        where = f"additional_config[{SECTION!r}]"
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, got {section!r}")
        for key in section:
            if key not in _KEYS:
                raise ConfigError(f"{where}: expected {', '.join(_KEYS)}, got {key!r}")
        changes = dict(section)
        if "bits" in changes:
            changes["bits"] = _checked_bits(changes["bits"])
        if "calibration" in changes and not isinstance(changes["calibration"], str):
            raise ConfigError(f"{where}: expected a folder as calibration, got {changes['calibration']!r}")
        if not isinstance(changes.get("guard", True), bool):
            raise ConfigError(f"{where}: expected true or false as guard, got {changes['guard']!r}")
        return replace(self, **changes)


def parse_variable(text: str | None) -> Settings | None:
    """The settings in the variable's value; None if it is unset, empty or 0.

    Raises:
        ConfigError: the value is neither a switch, nor a width, nor an existing path.
    """
    value = (text or "").strip()
    if value.lower() in _OFF:
        return None
    if value.lower() in _ON:
        return Settings()
    if value == "mixed" or (value.isdecimal() and int(value) in WIDTHS):
        return Settings(bits="mixed" if value == "mixed" else int(value))
    if Path(value).exists():
        return Settings(calibration=value)
    raise ConfigError(
        f"{VARIABLE}: expected 1, a width of {', '.join(map(str, WIDTHS))}, or a calibration's folder, "
        f"got {value!r}, which is none of them"
    )


def _checked_bits(bits: Any) -> Bits:
    """JSON lists become tuples."""
    return TurboConfig(bits=tuple(bits) if isinstance(bits, list) else bits).bits
