"""Calibrations without a model."""

from __future__ import annotations

import torch

from turboattention.calibration import Calibration, LayerStatistics, Provenance

HEADS, DIM = 2, 16


def layer(level: float = 0.1, priority: float = 1.0) -> LayerStatistics:
    """Errors that halve with every bit, in head 1 and in V half as large."""
    falling = torch.tensor([1.0, 0.5, 0.25, 1 / 64], dtype=torch.float64)
    errors = level * torch.tensor([[1.0, 0.5], [0.5, 0.25]], dtype=torch.float64)[..., None] * falling
    return LayerStatistics(
        errors=errors,
        costs=errors**2,
        priority=priority * torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64),
        k_mean=torch.arange(HEADS * DIM, dtype=torch.float32).reshape(HEADS, DIM) / 7,
        outliers=((3,), ()),
        k_weight=torch.arange(HEADS * DIM, dtype=torch.float64).reshape(HEADS, DIM) ** 2 / 7,
    )


def provenance(**shape: str | int | None) -> Provenance:
    return Provenance("some/model", "ab" * 32, shape, "cd" * 32, 4096, 1024, "0.1.0")


def calibration(*levels: float, **options) -> Calibration:
    """One layer for each level of error."""
    layers = tuple(layer(level) for level in levels or (0.1, 0.4))
    return Calibration.choose(layers, provenance(head_dim=DIM), **options)
