"""This file owns pictures of matrices: the inner products of slot parameters, block by block.

E experts  S slots per expert  M = E S slots
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from softmoe_train.drawing.panels import finish, grid, png

LINES = 40  # experts up to which their edges are drawn


def draw_similarity(products: Mapping[int, NDArray[np.float64]], num_experts: int, what: str) -> bytes:
    """By block, the inner products of all pairs of slots, those of one expert beside each other (paper Figs. 28 to 30)."""
    figure, panels = grid(len(products), f"Inner products of {what} of unit length", high=2.6)
    image = None
    for axes, (block, of) in zip(panels, products.items(), strict=True):
        M = len(of)
        image = axes.imshow(of, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest", extent=(0, M, M, 0))
        finish(axes, f"block {block}", "slot", "slot")
        axes.grid(visible=False)
        if num_experts < M and num_experts <= LINES:
            edges = np.arange(0, M + 1, M // num_experts)
            axes.vlines(edges, 0, M, color="black", linewidth=0.25)
            axes.hlines(edges, 0, M, color="black", linewidth=0.25)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=30)
    bar.ax.tick_params(labelsize=8)
    return png(figure)
