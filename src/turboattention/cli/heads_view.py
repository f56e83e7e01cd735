"""The widths and errors of heads, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..config import WIDTHS
from ..words import listed, number_of

if TYPE_CHECKING:
    from ..calibration import Calibration


@dataclass(frozen=True)
class Head:
    """One KV head of a layer. Pairs are (K, V).

    error: relative error of its output at the chosen widths. bound: the guard's bound at these widths.
    cost: expected KL divergence in nats per token at these widths.
    errors, costs: the same with only K or only V quantized, at 2, 3, 4 and 8 bits. priority: the paper's.
    """

    layer: int
    head: int
    bits: tuple[int, int]
    error: float
    bound: float
    cost: float
    priority: tuple[float, float]
    errors: list[list[float]]
    costs: list[list[float]]
    outliers: list[int]


def heads(calibration: Calibration) -> list[Head]:
    """All heads, layer by layer."""
    found = []
    for index, layer in enumerate(calibration.layers):
        bits, errors = calibration.head_bits[index], calibration.chosen_errors[index]
        costs = calibration.chosen_costs[index]
        for head in range(bits.shape[1]):
            found.append(
                Head(
                    layer=index,
                    head=head,
                    bits=(int(bits[0, head]), int(bits[1, head])),
                    error=float(errors[head]),
                    bound=calibration.bounds[int(bits[:, head].min())],
                    cost=float(costs[:, head].sum()),
                    priority=(float(layer.priority[0, head]), float(layer.priority[1, head])),
                    errors=layer.errors[:, head].tolist(),
                    costs=layer.costs[:, head].tolist(),
                    outliers=list(layer.outliers[head]),
                )
            )
    return found


def as_json(calibration: Calibration) -> dict[str, Any]:
    return {
        "provenance": asdict(calibration.provenance),
        "strategy": calibration.strategy,
        "budget": calibration.budget,
        "average_bits": calibration.average_bits,
        "expected_kl": calibration.expected_kl,
        "means": calibration.means,
        "exact_layers": list(calibration.exact_layers),
        "widths": list(WIDTHS),
        "heads": [asdict(head) for head in heads(calibration)],
    }


def summary(calibration: Calibration) -> str:
    """The chosen widths, in two sentences."""
    exact = calibration.exact_layers
    beyond = [f"{x.layer}.{x.head}" for x in heads(calibration) if not x.error <= x.bound and x.layer not in exact]
    counts = Counter(int(bits) for layer in calibration.head_bits for bits in layer.flatten())
    shares = ", ".join(f"{counts[width]} at {width}" for width in WIDTHS if counts[width])
    text = (
        f"{calibration.average_bits:.2f} bits on average by {calibration.strategy} (K and V of heads: {shares}); "
        f"expected KL {calibration.expected_kl:.4f} nats per token. Measured on "
        f"{number_of(calibration.provenance.tokens, 'token')}."
    )
    orders = calibration.k_order
    if orders is not None:
        halved = [two for order in orders for two in order.halved.tolist()]
        text = f"{text} With reorder_k, K of {sum(halved)} of {len(halved)} heads has two widths."
    if exact:
        kept = listed("layer", exact)
        text = f"{text} A TurboCache keeps {kept} in the model's own dtype, because 8 bits are not enough."
    if beyond:
        text = f"{text} Beyond their bound (layer.head): {', '.join(beyond)}."
    found = unusual_layers(calibration)
    return f"{text} Unusual: {'; '.join(found.values())}." if found else text


STANDS_OUT = 5.0
"""A layer is unusual if the error of its keys is this many times that of the median layer."""


def k_errors(calibration: Calibration, width: int) -> list[list[float]]:
    """[layer][head]: relative error of the head's output with only K quantized, at `width` bits."""
    return [layer.errors[0, :, WIDTHS.index(width)].tolist() for layer in calibration.layers]


def unusual_layers(calibration: Calibration) -> dict[int, str]:
    """Layers whose keys have a much larger error than others even at 8 bits, and a message about each."""
    worst = [max(heads) for heads in k_errors(calibration, 8)]
    usual = median(worst)
    return {
        index: f"layer {index}: K at 8 bits loses {error:.2g}, the median layer {usual:.2g}"
        for index, error in enumerate(worst)
        if error > STANDS_OUT * usual
    }


def widths_table(calibration: Calibration) -> Table:
    """One row per layer: the widths of its heads."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("layer", "K bits", "V bits", "worst error", "cost"):
        table.add_column(name, justify="right")
    for index, bits in enumerate(calibration.head_bits):
        rows = [" ".join(map(str, row)) for row in bits.tolist()]
        error, cost = float(calibration.chosen_errors[index].max()), float(calibration.chosen_costs[index].sum())
        table.add_row(str(index), *rows, f"{error:.3f}", cost_text(cost))
    return table


def heads_table(calibration: Calibration) -> Table:
    """One row per head."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, caption=LEGEND, caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    for head, cells in zip(heads(calibration), cells_of(calibration), strict=True):
        style = "red" if not head.error <= head.bound else None
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


COLUMNS = (
    "\nlayer",
    "\nhead",
    "bits\nK V",
    "\nerror",
    "\ncost",
    "K at\n2",
    "K at\n4",
    "V at\n2",
    "V at\n4",
    "prio.\nof K",
    "prio.\nof V",
    "outl.\nof K",
)
LEGEND = (
    "error: relative error of the head's output at its widths, during decode. cost: the expected increase of the "
    "KL divergence, in 1e-4 nats per token; then the same for only K or V, at 2 and 4 bits. prio.: the "
    "paper's priority, gap x std. outl.: outlier channels."
)


def cells_of(calibration: Calibration) -> list[list[str]]:
    """The rows below `COLUMNS`, as text."""
    return [
        [
            str(head.layer),
            str(head.head),
            f"{head.bits[0]} {head.bits[1]}",
            f"{head.error:.3f}",
            cost_text(head.cost),
            *(cost_text(row[WIDTHS.index(width)]) for row in head.costs for width in (2, 4)),
            *(f"{x:.3g}" for x in head.priority),
            _some(head.outliers),
        ]
        for head in heads(calibration)
    ]


def cost_text(nats: float) -> str:
    """In units of 1e-4 nats."""
    return f"{nats * 1e4:.2f}" if nats < 0.01 else f"{nats * 1e4:.0f}"


def _some(channels: list[int]) -> str:
    shown = " ".join(map(str, channels[:6]))
    return f"{shown} … ({len(channels)})" if len(channels) > 6 else shown or "–"
