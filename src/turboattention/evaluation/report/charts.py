"""Figures of the reports. Each returns a matplotlib `Figure`, which `Page.figure` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox


NEAR = ((6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right"))
FAR = tuple(
    (x, y, side) for y in (16, -22, 28, -34, 40, -46, 52, -58, 64, -70) for x, side in ((10, "left"), (-10, "right"))
)
"""Candidate positions of a label next to its point, the nearest first: the offset in points, and the alignment."""


@dataclass(frozen=True)
class Point:
    """A method's size and loss; `low` to `high` is the interval of the loss."""

    name: str
    bits: float
    value: float
    low: float
    high: float
    own: bool = False
    """Whether the method belongs to this package."""


def heat_map(values: Sequence[Sequence[float]], *, title: str, label: str, highest: float | None = None) -> Figure:
    """One cell per layer (rows, from 0) and head (columns); `highest` is the upper end of the color scale."""
    figure = _figure(0.42 * len(values[0]) + 2.6, 0.3 * len(values) + 1.1)
    axes = figure.subplots()
    drawn = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.set_xticks(_ticks(len(values[0])))
    axes.set_yticks(_ticks(len(values)))
    figure.colorbar(drawn, label=label)
    return figure


def pareto(points: Sequence[Point], *, ylabel: str, with_front: bool = True) -> Figure:
    """Loss against bits per element, with the Pareto front."""
    figure = _figure(10, 6)
    axes = figure.subplots()
    for point in points:
        spread = [[max(point.value - point.low, 0)], [max(point.high - point.value, 0)]]
        marker = "o" if point.own else "s"
        axes.errorbar(
            point.bits, point.value, yerr=spread, marker=marker, markersize=5, color=_colour(point), capsize=2
        )
    if with_front:
        best = front(points)
        bits, values = [p.bits for p in best], [p.value for p in best]
        axes.plot(bits, values, color="C3", linewidth=0.9, zorder=0, label="Pareto front")
        axes.legend(frameon=False, fontsize=8)
    if points and all(point.low > 0 for point in points):
        axes.set_yscale("log")
    else:
        axes.axhline(0, color="C7", linewidth=0.8)
    # Logarithmic, because most methods are between 2 and 5 bits.
    axes.set_xscale("log", base=2)
    sizes = [
        size for size in (1, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16) if axes.get_xlim()[0] <= size <= axes.get_xlim()[1]
    ]
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.margins(x=0.12)
    axes.set(xlabel="bits per element, everything counted", ylabel=ylabel)
    axes.grid(linewidth=0.3)
    _name(axes, points)
    return figure


def _colour(point: Point) -> str:
    return "C0" if point.own else "0.45"


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Label each point at the nearest position with the least overlap; distant labels are connected by a line."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # positions on the page are known only after drawing
    inside = axes.get_window_extent()
    taken = [_around(axes, point) for point in points]
    for point in sorted(points, key=lambda p: (not p.own, p.value)):
        overlaps: dict[tuple[int, int, str], int] = {}
        for position in (*NEAR, *FAR):
            text = _label(axes, point, position)
            box = text.get_window_extent()
            text.remove()
            outside = not (inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1)
            overlaps[position] = sum(box.overlaps(other) for other in taken) + outside
            if not overlaps[position]:
                break
        position = min(overlaps, key=overlaps.__getitem__)
        taken.append(_label(axes, point, position).get_window_extent())
        if position in FAR:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            to, at = (point.bits, point.value), (position[0], position[1] + 3)
            axes.annotate("", to, xytext=at, textcoords="offset points", arrowprops=line)


def _label(axes: Axes, point: Point, position: tuple[int, int, str]) -> Annotation:
    return axes.annotate(
        point.name,
        (point.bits, point.value),
        xytext=position[:2],
        textcoords="offset points",
        fontsize=7.5,
        color=_colour(point),
        horizontalalignment=position[2],
    )


def _around(axes: Axes, point: Point) -> Bbox:
    """What a point covers of the page, with its interval."""
    from matplotlib.transforms import Bbox

    (x, low), (_, high) = axes.transData.transform([(point.bits, point.low), (point.bits, point.high)])
    return Bbox.from_extents(x - 4, low, x + 4, high)


def front(points: Sequence[Point]) -> list[Point]:
    """The points of the Pareto front, from small to large."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.value)):
        if not best or point.value < best[-1].value:
            best.append(point)
    return best


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
    emphasized: Sequence[str] = (),
) -> Figure:
    """One line per name with (x, y); `emphasized` lines are solid, the others dashed."""
    figure = _figure(11, 4.8)
    axes = figure.subplots()
    for index, (name, (x, y)) in enumerate(series.items()):
        solid = name in emphasized
        # Colors repeat after ten lines; markers distinguish lines of the same color.
        marker = "osv^DPX*"[index // 10 % 8]
        axes.plot(
            x,
            y,
            label=name,
            marker=marker,
            markersize=3,
            linewidth=1.3 if solid else 0.9,
            linestyle="-" if solid else "--",
        )
    if logarithmic and any(value > 0 for _, y in series.values() for value in y):
        axes.set_yscale("log", nonpositive="mask")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=7, ncols=2, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def by_layer(
    series: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str, emphasized: Mapping[int, str] | None = None
) -> Figure:
    """One point per head at its layer, for each name's [layer][head]; `emphasized` layers are shaded and labeled."""
    figure = _figure(8, 4)
    axes = figure.subplots()
    for index, (name, layers) in enumerate(series.items()):
        positions = [layer for layer, heads in enumerate(layers) for _ in heads]
        values = [value for heads in layers for value in heads]
        axes.scatter(positions, values, s=18, label=name, color=f"C{index}", marker="osv^D"[index % 5])
    for layer, text in (emphasized or {}).items():
        axes.axvspan(layer - 0.4, layer + 0.4, color="C3", alpha=0.15, linewidth=0)
        axes.annotate(
            text,
            (layer + 0.5, 0.97),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="C3",
            verticalalignment="top",
            horizontalalignment="left",
        )
    axes.set_yscale("log", nonpositive="mask")
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.set_xticks(_ticks(max((len(layers) for layers in series.values()), default=0)))
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _figure(width: float, height: float) -> Figure:
    # Not pyplot, which keeps every figure and needs a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ticks(count: int) -> list[int]:
    """0, 1, 2, ... for a few, multiples of some step for many."""
    step = max(1, -(-count // 16))
    return list(range(0, count, step))
