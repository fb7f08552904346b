"""This file owns how sizes are spread over a data set: counts in bins a factor of 2^(1/8) wide, which any number of processes can add."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEPS = 8  # bins of a factor of two
LOWEST = -16  # 2^-16: below any aspect
BINS = 64 * STEPS


class Spread(NamedTuple):
    """A histogram over powers of two, and the extremes exactly."""

    bins: NDArray[np.int64]
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of positive values."""
        if not values:
            return cls(np.zeros(BINS, np.int64), math.inf, 0.0)
        places = ((np.log2(values) - LOWEST) * STEPS).astype(np.int64).clip(0, BINS - 1)
        return cls(np.bincount(places, minlength=BINS), min(values), max(values))

    def __add__(self, other: "Spread") -> "Spread":  # type: ignore[override]
        return Spread(self.bins + other.bins, min(self.least, other.least), max(self.most, other.most))

    @property
    def count(self) -> int:
        """Of values."""
        return int(self.bins.sum())

    def quantile(self, part: float) -> float:
        """About the value below which this part lies: within 5 %."""
        if not self.count:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.bins), part * self.count))
        middle = 2.0 ** ((min(place, BINS - 1) + 0.5) / STEPS + LOWEST)
        return min(max(middle, self.least), self.most)

    def as_document(self) -> dict[str, object]:
        """Extremes, quantiles, and the counts of bins by their lower edge."""
        edges = {f"{2.0 ** (n / STEPS + LOWEST):.6g}": int(count) for n, count in enumerate(self.bins) if count}
        quantiles = {name: self.quantile(part) for name, part in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
        return {"least": self.least if self.count else 0.0, **quantiles, "most": self.most, "from": edges}
