"""This file owns pictures of curves: cumulative weights with bands, what tokens contribute, how unequally experts are read.

T tokens  E experts  M slots
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softmoe_train.drawing.panels import BLUES, INK, by_depth, finish, grid, png

Values = NDArray[np.float64]
BANDS = (0.6, 0.8, 0.9, 0.95, 0.99)  # central parts (paper Figs. 26, 27)


def quantile_curves(counts: NDArray[np.int64], levels: list[float]) -> Values:
    """(level, k): where so much of what is counted lies below, of counts "k bins" over [0, 1]; linear inside a bin."""
    bins = counts.shape[1]
    below = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(1)], 1) / counts.sum(1, keepdims=True)
    edges = np.arange(bins + 1) / bins
    return np.array([[np.interp(level, row, edges) for row in below] for level in levels])


def draw_cumulative(
    means: Mapping[int, Values], counts: Mapping[int, NDArray[np.int64]], title: str, unit: str
) -> bytes:
    """By block, how much weight the k largest hold: the mean over all rows, and central bands of them."""
    figure, panels = grid(len(means), title)
    for axes, (block, mean) in zip(panels, means.items(), strict=True):
        k = np.arange(len(mean) + 1)
        for band, colour in zip(BANDS[::-1], BLUES[:0:-1], strict=True):
            low, high = quantile_curves(counts[block], [(1 - band) / 2, (1 + band) / 2])
            axes.fill_between(k, [0, *low], [0, *high], color=colour, linewidth=0, label=f"central {100 * band:.0f} %")
        axes.plot(k, [0, *mean], color=BLUES[0], linewidth=1.6, label="mean")
        axes.plot([0, len(mean)], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="uniform")
        axes.set_xlim(0, len(mean))
        axes.set_ylim(0, 1.01)
        finish(axes, f"block {block}", f"largest {unit}", "cumulative weight")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return png(figure)


def draw_contribution(counts: Mapping[int, NDArray[np.int64]], edges: Values, mean: float) -> bytes:
    """By block, the share of tokens whose summed dispatch weight is at most x (paper Fig. 24 left); their mean is slots / tokens."""
    figure, (axes,) = grid(1, "What tokens contribute to all slots together", wide=6, high=4)
    for (block, of), colour in zip(counts.items(), by_depth(list(counts)), strict=True):
        axes.plot(edges[1:-1], of.cumsum()[:-1] / of.sum(), color=colour, linewidth=1.5, label=f"block {block}")
    axes.axvline(mean, color=INK, linewidth=0.9, linestyle="--", label=f"mean {mean:.3g}")
    axes.set_xlim(0, _end(counts, edges, mean))
    axes.set_ylim(0, 1.01)
    axes.set_xticks([tick for tick in (0.25, 1, 2, 3, 4, 5) if tick <= axes.get_xlim()[1]])
    finish(axes, "", "summed dispatch weight of a token", "share of tokens at or below")
    _legend(axes, len(counts) + 1)
    return png(figure)


def _end(counts: Mapping[int, NDArray[np.int64]], edges: Values, mean: float) -> float:
    """Where all but a thousandth of the tokens of each block are passed."""
    ends = [edges[np.searchsorted(of.cumsum(), 0.999 * of.sum()) + 1] for of in counts.values()]
    return float(min(edges[-2], max(2 * mean, 1.05, *ends)))


def draw_importance(importance: Mapping[int, Values], title: str, y: str) -> bytes:
    """By block, each expert's importance over the least one's, in ascending order (paper Fig. 24 middle)."""
    figure, (axes,) = grid(1, title, wide=6, high=4)
    most = 1.0
    for (block, of), colour in zip(importance.items(), by_depth(list(importance)), strict=True):
        ratios = np.sort(of / max(of.min(), 1e-9))
        most = max(most, ratios[-1])
        axes.plot(
            np.arange(1, len(of) + 1),
            ratios,
            color=colour,
            linewidth=1.5,
            marker=".",
            markersize=4,
            label=f"block {block}",
        )
    if most > 30:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05 * most)
    finish(axes, "", "experts, from the least to the most important", y)
    _legend(axes, len(importance))
    return png(figure)


def draw_slot_curves(curves: Mapping[int, Values]) -> bytes:
    """By block, a line for each slot: the mean weight of its k most important tokens together (paper Fig. 24 right)."""
    figure, panels = grid(len(curves), "Cumulative dispatch weight of single slots (a line each, mean over images)")
    for axes, (block, of) in zip(panels, curves.items(), strict=True):
        k = np.arange(of.shape[1] + 1)
        lines = np.concatenate([np.zeros((len(of), 1)), of], 1)
        alpha = float(np.clip(12 / len(of), 0.06, 0.6))
        axes.plot(k, lines.T, color=BLUES[1], linewidth=0.8, alpha=alpha)
        axes.plot([0, of.shape[1]], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(0, of.shape[1])
        axes.set_ylim(0, 1.01)
        finish(axes, f"block {block}", "largest tokens", "cumulative weight")
    return png(figure)


def _legend(axes: Any, entries: int) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=1 + entries // 9)
