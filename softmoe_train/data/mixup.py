"""This file owns mixup (Zhang et al. 2018): which images of a global batch are mixed, how much of each, and the labels of that.

In a global batch of N images that begins at sample b, sample g is mixed with sample b + (g - b + L) mod N: the next of its stream in
the batch, and after the last the first. W divides L, so both always lie on one rank, L / W rows apart: nothing is decoded twice or
sent, and ranks, workers and micro-batches change no number. (V-MoE mixed in such rings too, one on each device; big_vision in one ring over
the batch.) A stream shuffles within its own part of the tars, so pairs are as mixed as `data.shuffle_window` makes them; where a stream has but two
images in a batch, both mixed images are of this pair.

The weight of sample g is X or 1 - X, whichever is larger, for X from Beta(p, p) by (seed, g): as in both, each image is the larger part of
one mixed image and the smaller part of another, so none is lost. They draw one X for a device or a batch; here each image has its own.

Letters: B images of this rank's batch, C classes, L streams, W ranks, g a global sample.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softmoe_train.data.keyed import Draws

WHOLE = 1 << 16  # weights are multiples of 1 / WHOLE, so that mixing is arithmetic of integers


@dataclass(frozen=True)
class Mixup:
    """Mixing by weights from Beta(p, p), with labels over `num_classes`."""

    p: float
    num_classes: int
    seed: int

    def mix(
        self, images: NDArray[np.uint8], labels: Tensor, numbers: NDArray[np.int64], apart: int
    ) -> tuple[NDArray[np.uint8], Tensor]:
        """Images (B 3 S S) rounded to the nearest level and labels (B C), each mixed with those `apart` rows on, in a ring.

        `numbers` are the global samples of the rows; `labels` are class numbers, or rows of 0 and 1.
        """
        weights = [larger_weight(self.p, Draws(self.seed, g, "mixup")) for g in numbers.tolist()]
        mixed = np.empty_like(images)
        for row, weight in enumerate(weights):
            mixed[row] = _mean(images[row], images[(row + apart) % len(images)], weight)
        share = torch.tensor(weights, dtype=torch.float32)[:, None] / WHOLE
        return mixed, self._mean_labels(labels, labels.roll(-apart, 0), share)

    def _mean_labels(self, labels: Tensor, others: Tensor, share: Tensor) -> Tensor:
        if labels.ndim == 2:
            return share * labels + (1 - share) * others
        rows = torch.zeros(len(labels), self.num_classes)
        return rows.scatter_add_(1, torch.stack([labels, others], 1), torch.cat([share, 1 - share], 1))


def larger_weight(p: float, draws: Draws) -> int:
    """max(X, 1 - X) in units of 1 / WHOLE, for X from Beta(p, p), by two draws whatever p is.

    Student's t with 2 p degrees of freedom is sqrt(2 p (U^(-1/p) - 1)) cos(2 pi V) for uniform U and V (Bailey 1994), and
    1/2 + t / (2 sqrt(2 p + t^2)) is from Beta(p, p) (Devroye 1996).
    """
    power = (1.0 - draws.uniform()) ** (1 / p)
    square = (1 - power) * math.cos(2 * math.pi * draws.uniform()) ** 2
    return round(WHOLE * (1 + math.sqrt(square / (power + square))) / 2)


def _mean(image: NDArray[np.uint8], other: NDArray[np.uint8], weight: int) -> NDArray[np.uint32]:
    """`weight` parts of WHOLE of one picture and the rest of the other, rounded."""
    total = np.multiply(image, np.uint32(weight), dtype=np.uint32)
    total += np.multiply(other, np.uint32(WHOLE - weight), dtype=np.uint32)
    return (total + np.uint32(WHOLE // 2)) // np.uint32(WHOLE)
