"""The widths and errors of heads as one HTML page with figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..evaluation.report.charts import by_layer, heat_map
from ..evaluation.report.page import Page
from ..words import number_of
from .heads_view import COLUMNS, LEGEND, cells_of, heads, k_errors, summary, unusual_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration import Calibration


def page(calibration: Calibration) -> str:
    """A self-contained HTML page."""
    origin = calibration.provenance
    made = Page("Where bits go", f"{origin.model}, measured on {number_of(origin.tokens, 'token')} of text")
    made.text(summary(calibration))
    made.section("Layers and heads")
    made.figure(
        keys_by_layer(calibration), "Relative error of each head's attention output with only K quantized, by layer"
    )
    for row, name in enumerate(("K", "V")):
        widths = [bits[row].tolist() for bits in calibration.head_bits]
        made.figure(
            heat_map(_grid(widths), title=f"Width of {name}", label="bits"),
            f"Bits of {name} by layer and KV head",
        )
    errors = [error.tolist() for error in calibration.chosen_errors]
    made.figure(
        heat_map(_grid(errors), title="Error at these widths", label="relative error"),
        "Relative error of each head's attention output by layer and KV head",
    )
    for row, name in enumerate(("K", "V")):
        costs = [(layer.costs[row, :, 0] * 1e4).tolist() for layer in calibration.layers]
        made.figure(
            heat_map(_grid(costs), title=f"Cost of {name} at 2 bits", label="1e-4 nats per token"),
            f"Expected KL divergence with {name} at 2 bits and all else unquantized, by layer and KV head",
        )
    made.section("Every head")
    found = heads(calibration)
    made.table(
        COLUMNS, cells_of(calibration), strong=[i for i, head in enumerate(found) if not head.error <= head.bound]
    )
    made.note(LEGEND)
    made.note(f"Text {origin.text_hash[:12]}, weights {origin.model_hash[:12]}, turboattention {origin.version}.")
    return made.html()


def keys_by_layer(calibration: Calibration) -> Figure:
    """The error of each head with only K quantized, by layer, which shows outliers."""
    return by_layer(
        {f"K at {width} bits": k_errors(calibration, width) for width in (2, 4, 8)},
        ylabel="relative error of the head's output",
        emphasized=unusual_layers(calibration),
    )


def _grid(rows: list[list[float]]) -> list[list[float]]:
    """Layers may have different numbers of heads."""
    width = max(map(len, rows))
    return [[*row, *[math.nan] * (width - len(row))] for row in rows]
