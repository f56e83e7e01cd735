"""Widths per head, chosen from measurements of a model and saved in a file.

    calibration = Calibration.load("folder")            # written by `turboattention calibrate`
    TurboCache(model.config, calibration=calibration)

Models are measured by `integrations.transformers.calibrate`.
"""

from __future__ import annotations

from .assignment import STRATEGIES, Strategy, assign_bits
from .calibration import Calibration, Provenance
from .measure import LayerMeter, LayerStatistics

__all__ = ["STRATEGIES", "Calibration", "LayerMeter", "LayerStatistics", "Provenance", "Strategy", "assign_bits"]
