"""The caches compared in vLLM: its own attention over a 16-bit and an fp8 cache, and TurboAttention at each width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TURBOATTENTION_VLLM"


@dataclass(frozen=True)
class Contender:
    """bits: "mixed" for a calibration's widths; None for vLLM's own cache. calibrated: with a calibration's means and
    order of K's channels. cache_dtype: vLLM's `kv_cache_dtype`, "auto" for the model's own."""

    name: str
    title: str
    bits: str | None
    calibrated: bool = False
    cache_dtype: str = "auto"

    @property
    def needs_calibration(self) -> bool:
        return self.calibrated or self.bits == "mixed"

    def environment(self, calibration: Path | None = None) -> dict[str, str]:
        """Added to a process's environment. The variable is always set, so that an inherited value has no effect."""
        if self.needs_calibration and calibration is None:
            raise ValueError(f"calibration: expected a folder for {self.name}, got none")
        return {VARIABLE: str(calibration) if self.needs_calibration else self.bits or ""}

    def options(self, gpu: bool = False) -> Mapping[str, Any]:
        """Arguments of `LLM`: on a CPU the plugin replaces the only backend."""
        found: dict[str, Any] = {"kv_cache_dtype": self.cache_dtype}
        if gpu and self.bits:
            found["attention_backend"] = "CUSTOM"
        if self.calibrated and self.bits:
            found["additional_config"] = {"turboattention": {"bits": int(self.bits), "reorder_k": True}}
        return found


STOCK = Contender("stock", "vLLM, 16 bits", None)
FP8 = Contender("stock-fp8", "vLLM, fp8", None, cache_dtype="fp8")
TURBO = tuple(Contender(f"turbo-{bits}", f"TurboAttention, {bits} bits", bits) for bits in ("8", "4", "3"))
MIXED = Contender("turbo-mixed", "TurboAttention, mixed 2 and 4 bits", "mixed")
TWO = Contender("turbo-2", "TurboAttention, 2 bits", "2")
CALIBRATED = tuple(
    Contender(f"turbo-{bits}-calibrated", f"TurboAttention, {bits} bits, calibrated", bits, calibrated=True)
    for bits in ("4", "3", "2")
)

ALL = (STOCK, FP8, *TURBO, MIXED, TWO)
"""Those that differ in the size of their pages."""
BY_NAME = {contender.name: contender for contender in (*ALL, *CALIBRATED)}
