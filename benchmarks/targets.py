"""Performance targets of the CPU kernels, and whether measured rows meet them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turboattention.benchmarking.records import Rival, Row

FAST_SDPA = 80
"""GFLOPS above which SDPA uses the processor's float units so well that the floor is 1.6x instead of 2x."""


@dataclass(frozen=True)
class Target:
    """One line of the table. `measured` returns a text and whether all rows reach the floor; None if there are no such
    rows."""

    work: str
    floor: str
    aim: str
    measured: Callable[[Sequence[Row]], tuple[str, bool] | None]


def _rivals(rows: Sequence[Row], work: str, peer: str, **where: object) -> list[tuple[Row, Rival]]:
    """Timed pairs of a kind of work with one peer."""
    return [
        (row, rival)
        for row in rows
        if row.work == work and _matches(row, where)
        for rival in row.rivals
        if rival.peer == peer and rival.ratio is not None
    ]


def _matches(row: Row, where: dict[str, object]) -> bool:
    return all((row.bits if name == "bits" else row.shape.get(name)) == value for name, value in where.items())


def _range(values: Sequence[float], unit: str = "x") -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _prefill(rows: Sequence[Row]) -> tuple[str, bool] | None:
    pairs = _rivals(rows, "prefill", "sdpa")
    if not pairs:
        return None
    reached = [rival.ratio.median >= (1.6 if (rival.gops or 0) > FAST_SDPA else 2.0) for _, rival in pairs]
    text = _range([rival.ratio.median for _, rival in pairs])
    return f"{text}; at the floor in {sum(reached)} of {len(reached)} shapes", all(reached)


def _decode(peer: str, floor: float) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def measured(rows: Sequence[Row]) -> tuple[str, bool] | None:
        pairs = [p for keys in (8192, 32768) for p in _rivals(rows, "decode", peer, bits="4 bits", keys=keys)]
        if not pairs:
            return None
        cells = [f"{rival.ratio.median:.2f}x at {row.shape['keys']:,}" for row, rival in pairs]
        return ", ".join(cells), all(rival.ratio.median >= floor for _, rival in pairs)

    return measured


def _narrow(bits: str) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def measured(rows: Sequence[Row]) -> tuple[str, bool] | None:
        ratios = [rival.ratio.median for _, rival in _rivals(rows, "decode", "int4", bits=bits)]
        return (_range(ratios), min(ratios) >= 1) if ratios else None

    return measured


def _compress(rows: Sequence[Row]) -> tuple[str, bool] | None:
    shares = [row.figures["share"] for row in rows if row.work == "compress" and row.shape["keys"] == 4096]
    return (_range([100 * share for share in shares], " %"), max(shares) < 0.05) if shares else None


def _steps(rows: Sequence[Row]) -> tuple[str, bool] | None:
    found = [row.figures for row in rows if row.work == "steps"]
    if not found:
        return None
    flush = max(figures["flush_over_median"] for figures in found)
    line = max((figures.get("deviation_from_line", 0.0) for figures in found), default=0.0)
    return f"{flush:.2f}x at a flush, at most {line:.0%} from a line", flush <= 2


def _memory(bits: str, floor: float) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def measured(rows: Sequence[Row]) -> tuple[str, bool] | None:
        found = [
            row.figures["below_fp16"]
            for row in rows
            if row.work == "memory" and _matches(row, {"bits": bits, "keys": 8192, "head_dim": 128, "window": None})
        ]
        return (_range(found), min(found) >= floor) if found else None

    return measured


TARGETS = (
    Target(
        "prefill, causal and full, head_dim 64 and 128, 1k to 8k tokens, against SDPA float32",
        f"2.0x; 1.6x where SDPA itself exceeds {FAST_SDPA} GFLOPS",
        "75 % of the processor's INT8 peak",
        _prefill,
    ),
    Target("decode over INT4, 8k and 32k tokens, against ggml f16", "5x", "10x", _decode("ggml-f16", 5)),
    Target("the same against ggml q4_0", "10x", "20x", _decode("ggml-q4_0", 10)),
    Target("the same against SDPA float32", "10x", "30x", _decode("sdpa", 10)),
    Target("the same against SDPA float32 with a group's query heads as rows", "", "", _decode("sdpa-folded", 0)),
    Target("decode over INT3, against INT4", "1x", "1.2x", _narrow("3 bits")),
    Target("decode over mixed 2 and 4 bits, against INT4", "1x", "1.2x", _narrow("mixed")),
    Target(
        "compressing a block (both stages), per token, as a share of a decode step at 4k tokens",
        "< 5 %",
        "< 1 %",
        _compress,
    ),
    Target("a decode step as the context grows", "a flush costs at most 2x the median step", "linear", _steps),
    Target("memory below FP16, 8k tokens, head_dim 128, INT4", "3.6x", "", _memory("4 bits", 3.6)),
    Target("memory, INT3", "4.4x", "", _memory("3 bits", 4.4)),
    Target("memory, mixed", "4.4x", "", _memory("mixed", 4.4)),
    Target("memory, INT2", "6.5x", "", _memory("2 bits", 6.5)),
)
