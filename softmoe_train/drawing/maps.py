"""This file owns pictures of single slots over images: each patch as bright as its weight in the slot.

n images  M slots drawn
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmoe_train.drawing.panels import INK, png

DARKEST = 0.12  # what remains of a patch without weight


class SlotMap(NamedTuple):
    """One slot: its name, and its dispatch weights over the patches of each image, "n rows columns"."""

    name: str
    weights: NDArray[np.float64]


def draw_slot_maps(images: NDArray[np.uint8], slots: list[SlotMap], title: str) -> bytes:
    """A row for each image ("n Y X 3"): as it is, then as each slot reads it (paper Fig. 25), with its effective number of patches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n, side = len(images), 1.25
    figure = Figure(figsize=(side * (len(slots) + 1) + 0.2, 1.13 * side * n + 0.75), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n, len(slots) + 1, squeeze=False)
    for row, image in zip(panels, images, strict=True):
        row[0].imshow(image, interpolation="nearest")
    panels[0][0].set_title("image", fontsize=8, color=INK)
    for column, slot in enumerate(slots, start=1):
        panels[0][column].set_title(slot.name, fontsize=8, color=INK)
        for axes, image, weights in zip(panels[:, column], images, slot.weights, strict=True):
            axes.imshow(_shaded(image, weights), interpolation="nearest")
            axes.set_xlabel(f"{_effective(weights):.0f} patches", fontsize=7, labelpad=2)
    for axes in panels.flatten():
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK)
    return png(figure)


def _shaded(image: NDArray[np.uint8], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The image with each patch at the brightness of its weight, the heaviest as it is."""
    share = weights / max(weights.max(), 1e-12)
    patch = image.shape[0] // weights.shape[0]
    bright = DARKEST + (1 - DARKEST) * np.kron(share, np.ones((patch, patch)))
    return image / 255 * bright[:, :, None]


def _effective(weights: NDArray[np.float64]) -> float:
    p = weights.flatten()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
