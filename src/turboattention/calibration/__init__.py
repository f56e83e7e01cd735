"""Widths per head, measured once on a model and kept in a file.

    calibration = Calibration.load("folder")            # written by `turboattention calibrate`
    TurboCache(model.config, calibration=calibration)

What it knows of a model comes from `integrations.transformers.calibrate`.
"""

from __future__ import annotations

from .assignment import STRATEGIES, Strategy, assign_bits
from .calibration import Calibration, Provenance
from .measure import LayerMeter, LayerStatistics

__all__ = ["STRATEGIES", "Calibration", "LayerMeter", "LayerStatistics", "Provenance", "Strategy", "assign_bits"]
