"""This file owns what is measured of sparse routers: how evenly experts are asked, and which tokens and slots go without.

G routing groups  T tokens of a group  E experts  S slots per expert  K choices of a token
"""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from softmoe_train.model.routing import Routing
from softmoe_train.model.sparse import SparseRouting


class LoadSums:
    """Adds up what groups show of one layer; `total`, float64, may be summed over ranks before `measures`."""

    def __init__(self, dead: float, experts: int, device: torch.device) -> None:
        self.dead = dead
        self.experts = experts
        self.total = torch.zeros(6 + experts, dtype=torch.float64, device=device)

    def add(self, routing: Routing | SparseRouting, whole: Bool[Tensor, " G"]) -> None:
        """Take the decisions of some groups, those that are `whole`."""
        assert isinstance(routing, SparseRouting), type(routing)
        filled = (routing.seats.token < len(routing.seats.slots_of))[whole]
        times = routing.seats.slots_of.view(len(whole), -1)[whole]
        weights = routing.weights[whole][filled].double().sum()
        facts = [times.numel(), filled.numel(), (times == 0).sum(), filled.logical_not().sum(), filled.sum(), weights]
        sums = torch.stack([torch.as_tensor(fact, dtype=torch.float64, device=filled.device) for fact in facts])
        choices = routing.decisions.choices
        if choices is None:  # experts choose: what each one serves
            load = filled.sum((0, 2))
        else:
            load = choices[whole].flatten().bincount(minlength=self.experts)
        self.total += torch.cat([sums, load.double()])

    def measures(self) -> dict[str, float]:
        """Shares of tokens, slots and experts, and how uneven the load is: its entropy over log E, and its highest over its mean."""
        tokens, slots, unserved, unfilled, served, weights = self.total[:6].tolist()
        load = self.load()
        entropy = torch.special.entr(load).sum().item()
        return {
            "unserved_tokens": unserved / tokens,
            "unfilled_slots": unfilled / slots,
            "experts_per_token": served / tokens,
            "served_gate": weights / max(1.0, served),
            "load_entropy": entropy / math.log(self.experts) if self.experts > 1 else 1.0,
            "load_spread": (load.max() * self.experts).item(),
            "dead_experts": (load * self.experts < self.dead).double().mean().item(),
        }

    def load(self) -> Tensor:
        """Each expert's share of the load."""
        load = self.total[6:]
        return load / load.sum()
