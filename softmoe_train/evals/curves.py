"""This file owns what the pictures of Soft MoE's weightings are drawn from: counts that add up over images and ranks.

G images  T tokens  M slots of all experts
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_train.model.routing import Routing

BINS = 250  # of cumulative weights, over [0, 1]
COVERAGE_BINS, COVERAGE_END = 240, 6.0  # of a token's summed dispatch weights; one more bin holds what is above
HIGHEST_BINS = 50  # of a slot's highest weight, over [0, 1]


class CurveSums:
    """Adds up the cumulative weights of one layer's slots and tokens; `parts`, float64, may each be summed over ranks."""

    def __init__(self, tokens: int, num_slots: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens, self.num_slots = tokens, num_slots
        self.parts = {
            "dispatch": zeros(tokens, BINS),  # of each k, how many slots have so much in their k largest tokens
            "dispatch_sum": zeros(tokens),
            "combine": zeros(num_slots, BINS),
            "combine_sum": zeros(num_slots),
            "coverage": zeros(COVERAGE_BINS + 1),
            "highest": zeros(HIGHEST_BINS),
        }

    def add(self, routing: Routing, whole: Bool[Tensor, " G"]) -> None:
        """Take the weightings of some images, those that are `whole`."""
        dispatch, combine = routing.dispatch[whole].flatten(2), routing.combine[whole].flatten(2)
        for name, rows in (("dispatch", dispatch.mT.flatten(0, 1)), ("combine", combine.flatten(0, 1))):
            cumulative = cumulative_weights(rows)
            self.parts[f"{name}_sum"] += cumulative.double().sum(0)
            self.parts[name] += _counts(cumulative, BINS)
        covered = dispatch.sum(2).flatten() * (COVERAGE_BINS / COVERAGE_END)
        self.parts["coverage"] += covered.long().clamp(max=COVERAGE_BINS).bincount(minlength=COVERAGE_BINS + 1)
        self.parts["highest"] += _counts(dispatch.amax(1).flatten()[:, None], HIGHEST_BINS)[0]

    def mean(self, name: str) -> Tensor:
        """The mean cumulative weight of "dispatch" or "combine", by k."""
        return self.parts[f"{name}_sum"] / self.parts[name][0].sum()


def cumulative_weights(rows: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """How much weight the k largest of each row hold, k from 1."""
    return rows.sort(dim=1, descending=True).values.cumsum(1)


def _counts(values: Float[Tensor, "N K"], bins: int) -> Tensor:
    """ "K bins": how many rows have their k-th value in each bin of [0, 1]."""
    K = values.shape[1]
    at = (values * bins).long().clamp(0, bins - 1) + torch.arange(K, device=values.device) * bins
    return at.flatten().bincount(minlength=K * bins).view(K, bins).double()


def coverage_edges() -> list[float]:
    """The edges of the bins of "coverage"; the last one stands for all above."""
    return [i * COVERAGE_END / COVERAGE_BINS for i in range(COVERAGE_BINS + 1)] + [COVERAGE_END + 1]
