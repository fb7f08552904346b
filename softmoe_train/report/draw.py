"""This file owns the plots: curves, quality against cost, and heat maps, each as one SVG of a phone's width.

Words stay out of them: titles and legends are text of the page, which wraps and is read aloud.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np

from softmoe_train.report.grid import Grid
from softmoe_train.report.read import Curve
from softmoe_train.report.rows import Spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9fd8", "#555555")  # after Okabe and Ito
DASHES = ("", "6 2", "2 2", "8 2 2 2")  # as SVG writes them
SIZE = (4.6, 2.9)  # inches; 331 points
LEAST_SPAN = 0.02  # between the lightest and the darkest cell: of a share, or this part of another value
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names from outside may hold a dollar
    "svg.hashsalt": "softmoe",  # the same report twice is the same file
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.xmargin": 0.02,
}


class Look(NamedTuple):
    """How a row is drawn."""

    colour: str
    dash: str


class Svg(NamedTuple):
    """A plot, and its size in pixels."""

    text: str
    width: int
    height: int


class Line(NamedTuple):
    """A curve of a row, with its deviation over seeds where there are several, and the curves of the runs that are in no mean."""

    look: Look
    curve: Curve
    deviation: np.ndarray | None
    beside: list[Curve]


class Point(NamedTuple):
    """A row at its cost."""

    look: Look
    cost: float
    quality: Spread
    on_front: bool


def looks(count: int) -> list[Look]:
    """One for each row, told apart by colour and dashes; of very many by their order along a scale of colours."""
    if count <= len(COLOURS) * len(DASHES):
        return [Look(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]) for i in range(count)]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["viridis"]
    return [Look(to_hex(scale(0.9 * i / (count - 1))), "") for i in range(count)]


def draw_curves(lines: Sequence[Line], x: str) -> Svg:
    """Curves against steps or images seen (`x` is "steps" or "images")."""
    with _axes() as (axes, figure):
        for line in lines:
            style = _style(line.look)
            for curve in line.beside:
                axes.plot(getattr(curve, x), curve.values, **style, linewidth=0.7, alpha=0.6)
            values = line.curve.values
            # A lone point is a curve too.
            marker = {"marker": "o", "markersize": 4} if len(values) < 2 else {}
            axes.plot(getattr(line.curve, x), values, **style, linewidth=1.5, **marker)
            if line.deviation is not None:
                low, high = values - line.deviation, values + line.deviation
                axes.fill_between(getattr(line.curve, x), low, high, color=line.look.colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("images seen" if x == "images" else "step")
        _short_ticks(axes.xaxis)
        return _svg(figure)


def draw_points(points: Sequence[Point], cost: str) -> Svg:
    """Quality against `cost`, the name of its axis; the Pareto front is joined by a line of steps."""
    with _axes() as (axes, figure):
        for point in points:
            colour = point.look.colour
            axes.errorbar(
                point.cost, point.quality.mean, yerr=point.quality.deviation, color=colour, marker="o", capsize=2,
                markersize=7 if point.on_front else 5, markerfacecolor=colour if point.on_front else "white", linewidth=1,
            )  # fmt: skip
        front = sorted((point.cost, point.quality.mean) for point in points if point.on_front)
        axes.step([c for c, _ in front], [q for _, q in front], where="post", color="#777777", linewidth=1, zorder=0)
        costs = [point.cost for point in points]
        if min(costs) > 0 and max(costs) > 3 * min(costs):
            axes.set_xscale("log")
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(cost)
        _short_ticks(axes.xaxis, logarithmic=axes.get_xscale() == "log")
        return _svg(figure)


def draw_grid(grid: Grid) -> Svg:
    """A heat map of shares, darker for more, with each value written in its cell, in percent."""
    with _grid_axes(grid) as (axes, figure):
        _draw_cells(axes, grid, percent=True, lowest=False)
        return _svg(figure)


def grid_png(grid: Grid, title: str, *, percent: bool, lowest: bool) -> bytes:
    """The same as a picture that stands alone, under a title; darker for better, which is less where `lowest`."""
    file = io.BytesIO()
    with _grid_axes(grid) as (axes, figure):
        _draw_cells(axes, grid, percent=percent, lowest=lowest)
        figure.suptitle(title, fontsize=10)
        figure.savefig(file, format="png", dpi=200, facecolor="white")
    return file.getvalue()


def _grid_axes(grid: Grid) -> AbstractContextManager[tuple[Any, Any]]:
    return _axes(width=1.0 + (0.62 if _is_wide(grid) else 0.8) * len(grid.xs), height=0.9 + 0.45 * len(grid.ys))


def _is_wide(grid: Grid) -> bool:
    return len(grid.xs) > 5


def _draw_cells(axes: Any, grid: Grid, *, percent: bool, lowest: bool) -> None:
    from matplotlib.patches import Rectangle

    values = np.full((len(grid.ys), len(grid.xs)), math.nan)
    for (x, y), spread in grid.cells.items():
        values[grid.ys.index(y), grid.xs.index(x)] = spread.mean
    least = LEAST_SPAN if percent else LEAST_SPAN * float(np.nanmax(np.abs(values)))
    shade = shades(values, max(least, *(4 * (spread.deviation or 0.0) for spread in grid.cells.values())))
    if lowest:
        shade = 1 - shade
    axes.grid(visible=False)
    axes.imshow(0.08 + 0.84 * shade, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="//", edgecolor="#bbbbbb"))
            continue
        spread = grid.cells[grid.xs[column], grid.ys[row]]
        written, beside = f"{100 * value:.1f}" if percent else f"{value:.4g}", ""
        if spread.deviation is not None and not _is_wide(grid):
            beside = f"\n± {100 * spread.deviation:.1f}" if percent else f"\n± {spread.deviation:.2g}"
        colour = "white" if shade[row, column] > 0.55 else "black"
        size = 8 if _is_wide(grid) else 9
        axes.text(column, row, f"{written}{beside}", ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(range(len(grid.xs)), [f"{value:g}" for value in grid.xs])
    axes.set_yticks(range(len(grid.ys)), [f"{value:g}" for value in grid.ys])
    axes.tick_params(length=0)
    axes.set_xlabel(grid.x)
    axes.set_ylabel(grid.y)


def shades(values: np.ndarray, least: float) -> np.ndarray:
    """How dark each cell is, from 0 to 1, around one half: over the range of the values, or over `least`, where what lies between may be chance."""
    low, high = np.nanmin(values), np.nanmax(values)
    return 0.5 + (values - (low + high) / 2) / max(high - low, least, np.finfo(float).tiny)


@contextmanager
def _axes(width: float = SIZE[0], height: float = SIZE[1]) -> Iterator[tuple[Any, Any]]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        yield axes, figure


def _svg(figure: Any) -> Svg:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches()
    return Svg(file.getvalue(), round(96 * width), round(96 * height))


def _style(look: Look) -> dict[str, Any]:
    dashes = tuple(float(number) for number in look.dash.split())
    return {"color": look.colour, "linestyle": (0, dashes) if dashes else "-"}


def _short_ticks(axis: Any, *, logarithmic: bool = False) -> None:
    """Thousands as 10k: a phone has no room for 300,000 six times."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """Three digits and a unit: 1.5k, 22M, 0.034."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
