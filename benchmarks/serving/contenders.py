"""What is compared in vLLM: its own attention over a 16-bit cache, and TurboAttention at each width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TURBOATTENTION_VLLM"


@dataclass(frozen=True)
class Contender:
    """bits: what the environment variable says; None is vLLM alone, "mixed" needs the folder of a calibration."""

    name: str
    title: str
    bits: str | None

    def environment(self, calibration: Path | None = None) -> dict[str, str]:
        """Added to a process's environment. The variable is set either way: one that was inherited must not count."""
        if self.bits == "mixed" and calibration is None:
            raise ValueError(f"calibration: expected a folder for {self.name}, got none")
        return {VARIABLE: str(calibration) if self.bits == "mixed" else self.bits or ""}

    def options(self, gpu: bool) -> Mapping[str, Any]:
        """For `LLM`: on a CPU the plugin takes the place of the one backend there is."""
        return {"attention_backend": "CUSTOM"} if gpu and self.bits else {}


STOCK = Contender("stock", "vLLM, 16 bits", None)
TURBO = tuple(Contender(f"turbo-{bits}", f"TurboAttention, {bits} bits", bits) for bits in ("8", "4", "3"))
MIXED = Contender("turbo-mixed", "TurboAttention, mixed 2 and 4 bits", "mixed")
TWO = Contender("turbo-2", "TurboAttention, 2 bits", "2")

ALL = (STOCK, *TURBO, MIXED, TWO)
BY_NAME = {contender.name: contender for contender in ALL}
