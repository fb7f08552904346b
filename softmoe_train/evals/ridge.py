"""This file owns the closed-form linear classifier of few-shot: ridge regression to +-1 targets, for many strengths at once (paper.md 6.1).

N training images  n images to classify  D features  C classes  L strengths  r = min(N, D + 1)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BIAS = 100.0  # a constant feature, so large that its weight is hardly held down
STD_EPS = 1e-5
EXPONENTS = tuple(range(-10, 20))  # strengths are 2^i
_ROWS = 4096  # classified together
_DIGITS = 9  # of a score: what is equal in exact arithmetic ties on every layout, and the lower class has it


class Ridge(NamedTuple):
    """The solution for any strength l2: weights = left diag(1 / (eigenvalues + l2)) right."""

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]
    eigenvalues: Float[Tensor, " r"]
    left: Float[Tensor, "D1 r"]
    right: Float[Tensor, "r C"]

    def reduced(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n r"]:
        """What of features the scores depend on, whatever the strength."""
        return _whitened(features, self.mean, self.std) @ self.left

    def scores(self, reduced: Float[Tensor, "n r"], exponent: int) -> Float[Tensor, "n C"]:
        """The score of every class at the strength 2^exponent."""
        return (reduced / (self.eigenvalues + 2.0**exponent)) @ self.right


def solve_ridge(features: Float[Tensor, "N D"], classes: Int64[Tensor, " N"], num_classes: int) -> Ridge:
    """Whiten by the training images' own mean and deviation, add the bias, decompose X^T X (N >= D + 1) or X X^T, in float64."""
    features = features.double()
    mean, std = standards(features)
    X = _whitened(features, mean, std)
    targets = 2.0 * torch.nn.functional.one_hot(classes, num_classes).to(X) - 1.0
    if X.shape[0] >= X.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(X.mT @ X)
        return Ridge(mean, std, eigenvalues, vectors, vectors.mT @ (X.mT @ targets))
    eigenvalues, vectors = torch.linalg.eigh(X @ X.mT)
    return Ridge(mean, std, eigenvalues, X.mT @ vectors, vectors.mT @ targets)


def count_hits(
    ridge: Ridge, features: Float[Tensor, "n D"], classes: Int64[Tensor, " n"], exponents: Sequence[int]
) -> Int64[Tensor, " L"]:
    """How many images have their own class as the one with the highest score, at each strength."""
    hits = torch.zeros(len(exponents), dtype=torch.int64, device=features.device)
    for rows, truth in zip(features.split(_ROWS), classes.split(_ROWS), strict=True):
        reduced = ridge.reduced(rows.double())
        for at, exponent in enumerate(exponents):
            hits[at] += hit(ridge.scores(reduced, exponent), truth).sum()
    return hits


def hit(scores: Float[Tensor, "n C"], classes: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether the first of the highest scores is that of the image's class; never where scores are not finite."""
    best = scores.round(decimals=_DIGITS)
    # argmax may give any of equal ones.
    first = (best == best.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    return (first == classes) & best.isfinite().all(-1)


def mean_ranks(accuracies: Float[Tensor, "sets L"]) -> Float[Tensor, " L"]:
    """The rank of each strength, from 0 for the worst, averaged over the sets; of equal ones each has the mean of their ranks."""
    below = (accuracies[:, None, :] < accuracies[:, :, None]).sum(-1)
    alike = (accuracies[:, None, :] == accuracies[:, :, None]).sum(-1)
    return (below + (alike - 1) / 2).double().mean(0)


def best_strength(accuracies: Float[Tensor, "sets L"]) -> int:
    """Which strength has the highest mean rank over the sets; of equal ones the strongest."""
    ranks = mean_ranks(accuracies)
    return int((ranks >= ranks.max() - 1e-9).nonzero().max())


def standards(features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """The mean and deviation that features are whitened by, the latter infinite for what is the same in all of these images.

    Its weight is 0; without this, rounding of that 0 would meet a test image's difference divided by STD_EPS.
    """
    std = features.std(0, correction=0) + STD_EPS
    return features.mean(0), std.masked_fill((features == features[0]).all(0), torch.inf)


def _whitened(features: Float[Tensor, "n D"], mean: Tensor, std: Tensor) -> Float[Tensor, "n D1"]:
    whitened = (features - mean) / std
    return torch.cat([whitened, whitened.new_full((len(whitened), 1), BIAS)], dim=1)
