"""This file owns what all pictures share: a grid of panels with one look, and how a figure becomes a PNG."""

import importlib.util
import io
import math
from typing import Any

INK, GRID = "#222222", "#dddddd"
# Okabe and Ito's blue from dark to light: told apart by everyone, and in print.
BLUES = ("#04395e", "#0072b2", "#4d9ccb", "#8cc0df", "#c2deef", "#e3f0f8")
LACKS = "matplotlib is not installed: pip install 'softmoe-train[pictures]'"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def grid(count: int, title: str, *, wide: float = 3.1, high: float = 2.7) -> tuple[Any, list[Any]]:
    """A figure of `count` panels below a title, at most four beside each other, with scales of their own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, count) if count != 5 else 3
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.5, wide * columns), high * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure, axes[:count]


def finish(axes: Any, title: str, x: str, y: str) -> None:
    """Titles and labels, a light grid, no box."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def by_depth(blocks: list[int]) -> list[Any]:
    """A colour for each block, from the first (dark) to the last (light), by a map that everyone can order."""
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    return [viridis(0.9 * i / max(1, len(blocks) - 1)) for i in range(len(blocks))]


def png(figure: Any) -> bytes:
    """The figure as a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
