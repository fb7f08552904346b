"""This file owns what is measured of Soft MoE's weightings: sums that add up over images and ranks, and the measures they give.

G images  T tokens  E experts  S slots per expert  M = E S slots
"""

import math
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from softmoe_train.config import Record
from softmoe_train.model.routing import Routing
from softmoe_train.model.sparse import SparseRouting

Share = Annotated[float, Field(gt=0, le=1)]

# Means over slots (each column of D), and over tokens (each row of C, or each row of D summed), in the order of `SoftSums.total`.
OF_SLOTS = (
    "dispatch_entropy", "dispatch_max", "dispatch_min", "tokens_per_slot", "uniform_slots", "one_hot_slots",
    "duplicate_slots", "slot_similarity",
)  # fmt: skip
OF_TOKENS = (
    "combine_entropy", "combine_max", "combine_min", "slots_per_token", "uniform_tokens", "one_hot_tokens",
    "token_coverage", "low_coverage", "high_coverage",
)  # fmt: skip
LOW, HIGH = 0.25, 2.0  # of a token's summed dispatch weights (paper Fig. 24 left)
AT_ONCE = 2**24  # correlations of slots in memory
FLAT = 1e-5  # relative deviation below which weights are uniform to rounding, and correlate with nothing


class Thresholds(Record):
    """From where on a slot or a token counts as what its measure says."""

    near_uniform: Share  # effective number of tokens of a slot (slots of a token), as a share of all
    one_hot: Share  # weight of one token in a slot (one slot in a token)
    duplicate: Share  # correlation of two slots' dispatch weights
    dead: Annotated[
        float, Field(ge=0, lt=1)
    ]  # mean combine weight of a slot (summed, of an expert), as a share of the uniform one


class SoftSums:
    """Adds up what images show of one layer; `total`, float64, may be summed over ranks before `measures`."""

    def __init__(self, thresholds: Thresholds, tokens: int, experts: int, slots: int, device: torch.device) -> None:
        self.thresholds = thresholds
        self.sizes = (tokens, experts, slots)
        count = 1 + len(OF_SLOTS) + len(OF_TOKENS) + experts * slots
        self.total = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, routing: Routing | SparseRouting, whole: Bool[Tensor, " G"]) -> None:
        """Take the weightings of some images, those that are `whole`."""
        assert isinstance(routing, Routing), type(routing)
        dispatch, combine = routing.dispatch[whole].flatten(2), routing.combine[whole].flatten(2)
        if not len(dispatch):  # a rank may have padding alone
            return
        of_slots = [*self._shape(dispatch, 1), *_similarity(dispatch, self.thresholds.duplicate)]
        coverage = dispatch.sum(2)
        of_tokens = [*self._shape(combine, 2), coverage, coverage <= LOW, coverage > HIGH]
        sums = [value.double().sum() for value in (*of_slots, *of_tokens)]
        images = self.total.new_tensor([len(dispatch)])
        self.total += torch.cat([images, torch.stack(sums), combine.double().sum((0, 1))])

    def _shape(self, weights: Float[Tensor, "G T M"], dim: int) -> list[Tensor]:
        """How the weights along `dim`, which sum to 1, are spread; the effective number is exp(entropy), Hill's number of order 1."""
        n, entropy = weights.shape[dim], torch.special.entr(weights).sum(dim)
        most, effective = weights.amax(dim), entropy.exp()
        relative = entropy / math.log(n) if n > 1 else torch.ones_like(entropy)
        uniform = effective >= self.thresholds.near_uniform * n
        return [relative, most, weights.amin(dim), effective, uniform, most >= self.thresholds.one_hot]

    def measures(self) -> dict[str, float]:
        """The means, what is dead, and how unequally experts are read (paper Fig. 24 middle)."""
        T, E, S = self.sizes
        images, *sums = self.total[: 1 + len(OF_SLOTS) + len(OF_TOKENS)].tolist()
        read = self.read()
        slots = zip(OF_SLOTS, sums[: len(OF_SLOTS)], strict=True)
        tokens = zip(OF_TOKENS, sums[len(OF_SLOTS) :], strict=True)
        measures = {name: value / (images * E * S) for name, value in slots}
        measures |= {name: value / (images * T) for name, value in tokens}
        if E * S == 1:
            del measures["slot_similarity"]
        importance = read.sum(1)
        dead = self.thresholds.dead
        return measures | {
            "dead_slots": (read * E * S < dead).double().mean().item(),
            "dead_experts": (importance * E < dead).double().mean().item(),
            "expert_spread": (importance.max() / importance.min().clamp(min=1e-9)).item(),
        }

    def read(self) -> Float[Tensor, "E S"]:
        """The mean combine weight of each slot over all tokens; they sum to 1."""
        T, E, S = self.sizes
        return self.total[-E * S :].view(E, S) / (self.total[0] * T)


def _similarity(dispatch: Float[Tensor, "G T M"], duplicate: float) -> tuple[Tensor, Tensor]:
    """Which slots correlate with another one of their image above `duplicate`, and each slot's mean correlation with the others.

    Of the weights less their mean 1 / T: else any two near-uniform slots would be alike.
    """
    T, M = dispatch.shape[1:]
    centred = dispatch - 1 / T
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    unit = torch.where(length > FLAT / math.sqrt(T), centred / length, 0.0)
    duplicates, means = [], []
    for some in unit.split(max(1, AT_ONCE // M**2)):
        alike = some.mT @ some
        of_itself = alike.diagonal(dim1=1, dim2=2)
        means.append((alike.sum(2) - of_itself) / max(1, M - 1))
        of_itself.fill_(-1)
        duplicates.append(alike.amax(2) > duplicate)
    return torch.cat(duplicates), torch.cat(means)
