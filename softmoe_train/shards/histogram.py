"""This file owns the picture of a check: how labels, pixels, bytes and aspects are spread."""

from typing import Any

import numpy as np

from softmoe_train.shards.check import Checked
from softmoe_train.shards.spread import LOWEST, STEPS, Spread

COLOURS = {"train": "#0072b2", "test": "#d55e00"}  # Okabe and Ito: told apart by everyone


def draw_checked(checked: Checked, path: str) -> None:
    """Write a PNG of four histograms, a colour for each split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (labels, pixels), (sizes, aspect) = figure.subplots(2, 2)
    for split, whole in checked.splits.items():
        counts = np.sort([whole.labels.get(label, 0) for label in range(checked.num_classes)])[::-1]
        labels.step(
            np.arange(1, len(counts) + 1),
            counts,
            where="mid",
            color=COLOURS[split],
            label=f"{split}, {whole.good:,} good samples",
        )
        for axes, spread in ((pixels, whole.pixels), (sizes, whole.sizes), (aspect, whole.aspect)):
            _draw(axes, spread, COLOURS[split])
    titles = {
        labels: "classes, the one with most samples first",
        pixels: "pixels",
        sizes: "bytes of a picture",
        aspect: "width / height",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("samples of the class" if axes is labels else "pictures", fontsize=9)
        if axes is not labels or _ranges_far(checked):
            axes.set_yscale("symlog")
        axes.grid(color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    labels.set_ylim(bottom=0)
    labels.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _ranges_far(checked: Checked) -> bool:
    """Whether the classes of a split have so unlike counts that the small ones would not be seen beside the large."""
    counts = [list(whole.labels.values()) for whole in checked.splits.values()]
    return any(max(of) > 50 * max(1, min(of)) for of in counts if of)


def _draw(axes: Any, spread: Spread, colour: str) -> None:
    used = np.flatnonzero(spread.bins)
    if not len(used):
        return
    first, last = int(used[0]), int(used[-1])
    edges = 2.0 ** (np.arange(first, last + 2) / STEPS + LOWEST)
    axes.stairs(spread.bins[first : last + 1], edges, color=colour, fill=True, alpha=0.4)
    axes.set_xscale("log", base=2)
