"""Reads and writes a `Calibration` as JSON, with checks of every field."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import WIDTHS
from ..errors import FormatError, InputError, TurboError
from ..files import new_folder, read_json, write_text
from ..kv.widths import parse_head_bits
from .assignment import STRATEGIES
from .calibration import Calibration, Provenance
from .measure import LayerStatistics

FORMAT = "turboattention-calibration"
VERSION = 2
"""Version 2 added `LayerStatistics.k_weight`; files of version 1 are read without it."""
FILE = "calibration.json"


def save_calibration(calibration: Calibration, folder: str | os.PathLike[str]) -> None:
    """Write `calibration` to `folder`/calibration.json."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": asdict(calibration.provenance),
        "budget": calibration.budget,
        "strategy": calibration.strategy,
        "means": calibration.means,
        "bounds": {str(width): bound for width, bound in calibration.bounds.items()},
        "widths": list(WIDTHS),
        "exact_layers": list(calibration.exact_layers),
        "layers": [_layer(layer, bits) for layer, bits in zip(calibration.layers, calibration.head_bits, strict=True)],
    }
    with new_folder(Path(folder), "folder"):
        write_text(Path(folder) / FILE, json.dumps(content, indent=1) + "\n", "folder")


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read `path`, or `path`/calibration.json; a regular file."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        content = read_json(file)
    except OSError as error:
        raise InputError(
            f"path: expected a calibration, {str(file)!r} cannot be read: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise FormatError(f"path: expected a calibration, got {file}, which is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"path: expected a calibration, got another kind of file: {file}")
    if content.get("version") not in (1, VERSION):
        raise FormatError(
            f"path: expected version 1 or {VERSION} of a calibration, got {content.get('version')} in {file}"
        )
    try:
        return _read(content)
    except (TurboError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise FormatError(f"path: expected a calibration, got a damaged one: {file} ({_reason(error)})") from error


def _layer(layer: LayerStatistics, bits: Tensor) -> dict[str, Any]:
    weight = {} if layer.k_weight is None else {"k_weight": _rounded(layer.k_weight)}
    return weight | {
        "head_bits": bits.tolist(),
        "errors": _rounded(layer.errors),
        "costs": _rounded(layer.costs),
        "priority": _rounded(layer.priority),
        "outliers": [list(channels) for channels in layer.outliers],
        "k_mean": _rounded(layer.k_mean),
    }


def _rounded(x: Tensor) -> Any:
    """Six digits, more than the precision of the measurements."""

    def short(value: Any) -> Any:
        return [short(x) for x in value] if isinstance(value, list) else float(f"{value:.6g}")

    return short(x.tolist())


def _read(content: dict[str, Any]) -> Calibration:
    if content["widths"] != list(WIDTHS) or content["strategy"] not in STRATEGIES or not content["layers"]:
        raise ValueError("widths, strategy or layers")
    layers, widths = [], []
    for entry in content["layers"]:
        heads = len(entry["outliers"])
        mean = _numbers(entry, "k_mean", (heads, None), torch.float32)
        layers.append(
            LayerStatistics(
                errors=_numbers(entry, "errors", (2, heads, len(WIDTHS))),
                costs=_numbers(entry, "costs", (2, heads, len(WIDTHS))),
                priority=_numbers(entry, "priority", (2, heads)),
                k_mean=mean,
                outliers=tuple(tuple(int(channel) for channel in row) for row in entry["outliers"]),
                k_weight=_weight(entry, mean.shape) if content["version"] > 1 else None,
            )
        )
        bits = parse_head_bits(entry["head_bits"], heads)
        if bits is None:
            raise ValueError("head_bits")
        widths.append(bits)
    return Calibration(
        layers=tuple(layers),
        provenance=Provenance(**content["provenance"]),
        head_bits=tuple(widths),
        budget=float(content["budget"]),
        strategy=content["strategy"],
        means=bool(content["means"]),
        exact_layers=_indices(content.get("exact_layers", []), len(layers)),
        bounds={int(width): float(bound) for width, bound in content["bounds"].items()},
    )


def _indices(values: Any, count: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(i) is int and 0 <= i < count for i in values):
        raise ValueError(f"exact_layers: expected indices of layers from 0 to {count - 1}, got {values!r}")
    return tuple(values)


def _weight(entry: dict[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Absent if a file of version 1 was loaded and saved again."""
    if "k_weight" not in entry:
        return None
    weight = _numbers(entry, "k_weight", shape)
    if bool((weight < 0).any()):
        raise ValueError(f"k_weight: expected at least 0, got {float(weight.min())}")
    return weight


def _numbers(
    entry: dict[str, Any], name: str, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float64
) -> Tensor:
    values = torch.tensor(entry[name], dtype=dtype)
    fits = values.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, values.shape, strict=True))
    if not fits or not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers {list(shape)}, got shape {list(values.shape)}")
    return values


def _reason(error: Exception) -> str:
    return f"without {error}" if isinstance(error, KeyError) else str(error)
