"""Adafactor in float64 by numpy, matrix by matrix, as its paper writes it: V = R C / sum(R), R and C sums over rows and columns."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]


def matrices(name: str, value: Array) -> Iterator[Array]:
    """The matrices that a parameter holds, as views: one for each expert where it has experts; none where it is no matrix."""
    if name.endswith((".w1", ".w2")):
        yield from value
    elif name.endswith(".phi"):
        yield from value.transpose(1, 0, 2)
    elif value.ndim == 2 and not name.endswith((".b1", ".b2")):
        yield value


def bfloat16(value: Array) -> Array:
    """Rounded to the nearest bfloat16."""
    return torch.from_numpy(value).bfloat16().double().numpy()


class Reference:
    """One parameter; `smallest` is the side from which a matrix is factored."""

    def __init__(self, name: str, value: Array, smallest: int, beta1: float) -> None:
        self.value = value.copy()
        self.beta1 = beta1
        self.average = np.zeros_like(value)
        self.second = np.zeros_like(value)  # whole
        self.views = list(matrices(name, self.value))
        self.factored = bool(self.views) and min(self.views[0].shape) >= smallest
        self.rows = [np.zeros(v.shape[0]) for v in self.views]
        self.columns = [np.zeros(v.shape[1]) for v in self.views]
        self.name = name

    def update(
        self, gradient: Array, t: int, rate: float, decay: float, eps: float = 1e-30, cap: float = 0.999
    ) -> None:
        """The t-th update, t from 1."""
        beta2 = min(cap, 1 - t**-0.8)
        square = gradient**2 + eps
        update = np.empty_like(gradient)
        if self.factored:
            parts = zip(
                matrices(self.name, square), matrices(self.name, gradient), matrices(self.name, update), strict=True
            )
            for i, (s, g, u) in enumerate(parts):
                self.rows[i] = beta2 * self.rows[i] + (1 - beta2) * s.sum(1)
                self.columns[i] = beta2 * self.columns[i] + (1 - beta2) * s.sum(0)
                u[:] = g / np.sqrt(np.outer(self.rows[i], self.columns[i]) / self.rows[i].sum())
        else:
            self.second = beta2 * self.second + (1 - beta2) * square
            update = gradient / np.sqrt(self.second)
        update = self.beta1 * self.average + (1 - self.beta1) * update
        self.average = bfloat16(update)
        self.value -= rate * (update + decay * self.value)
