"""This file owns the sparse routers: who reads what where tokens compete for slots of limited capacity.

G routing groups, each of consecutive images  T tokens of a group  D width  E experts  K choices of a token  S slots per expert
B images
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from softmoe_train.model.init import InitRule, lecun_normal
from softmoe_train.model.keyed import keys_at, normal
from softmoe_train.model.records import MoEConfig
from softmoe_train.model.routing import check_router_dtype, widened
from softmoe_train.model.seats import Seats, seats_of

Gates = Float[Tensor, "G T E"]
Real = Bool[Tensor, "G T"]


class Decisions(NamedTuple):
    """What a router decided by comparing gates. All else follows from it by counting."""

    token: Int64[Tensor, "G E S"]  # of each slot, by its number in the group; T where the slot is empty
    choices: Int64[Tensor, "G T K"] | None  # tokens choice: the experts that each token asks for, the best first
    priority: Int64[Tensor, "G T"] | None  # tokens choice: the tokens in the order in which they are served


class SparseRouting(NamedTuple):
    """What a sparse router decided: the slots' contents, the gate of each slot's token, and what it tells of its groups."""

    slots: Float[Tensor, "G E S D"]  # zeros where empty
    weights: Float[Tensor, "G E S"]  # float32, 0 where empty
    seats: Seats
    told: Float[Tensor, " M"]  # routing.MEASURES, summed over groups
    decisions: Decisions

    def read(self, outputs: Float[Tensor, "G E S D"]) -> Float[Tensor, "N D"]:
        """Each token's sum of the slots that hold it, weighted by its gates, which are not renormalised; 0 where none does."""
        return self.seats.read(outputs, self.weights)


class SparseRouter(nn.Module, ABC):
    """What both sparse routers share: a gate without bias, noise on its logits in training, a softmax over the experts.

    The gate, the logits and the softmax are float32, whatever the precision of the tokens.
    """

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.noise_std = config.sparse.noise_std / config.num_experts
        self.gate = nn.Parameter(torch.empty(width, config.num_experts))

    def init_rules(self) -> dict[str, InitRule]:
        """LeCun-normal, as flax's Dense that the released code uses."""
        return {"gate": InitRule(lecun_normal(self.gate.shape[0]))}

    @abstractmethod
    def decide(self, gates: Gates, slots_per_expert: int, real: Real | None) -> Decisions:
        """Who sits where. Equal gates are decided by number: the lower expert, the earlier token."""

    def auxiliary_loss(self, logits: Gates, noisy: Gates, gates: Gates, decisions: Decisions) -> Float[Tensor, " G"]:
        """What is minimised beside the loss, of each group."""
        return logits.new_zeros(logits.shape[0])

    def forward(
        self,
        x: Float[Tensor, "G T D"],
        keys: Int64[Tensor, " B"] | None = None,
        real: Bool[Tensor, " B"] | None = None,
    ) -> SparseRouting:
        """Fill the slots with tokens. `keys`, in training, are what noise is derived from; images that are not `real` take no slot."""
        check_router_dtype(self.gate)
        G, T, _ = x.shape
        image_tokens = T // self.config.group_images
        with torch.autocast(x.device.type, enabled=False):
            logits = widened(x, self.gate) @ self.gate
            noisy = logits if keys is None else self._with_noise(logits, keys)
            gates = noisy.softmax(-1)
            on_tokens = None if real is None else real.view(G, -1).repeat_interleave(image_tokens, 1)
            decisions = self.decide(gates.detach(), self.config.capacity(image_tokens), on_tokens)
            seats = seats_of(decisions.token, T)
            filled = decisions.token < T
            weights = torch.where(filled, gates.mT.gather(2, decisions.token.clamp(max=T - 1)), 0.0)
            auxiliary = self.auxiliary_loss(logits, noisy, gates, decisions).sum()
            shares = [(seats.slots_of == 0).sum() / T, (~filled).sum() / filled[0].numel()]
        told = torch.stack([auxiliary, *(share.to(auxiliary.dtype) for share in shares)])
        return SparseRouting(seats.fill(x), weights, seats, told, decisions)

    def _with_noise(self, logits: Gates, keys: Int64[Tensor, " B"]) -> Gates:
        """The logits with noise of N(0, (noise_std / E)²), by (key of the image and layer, token, expert)."""
        if self.noise_std == 0:
            return logits
        of_image = (logits.shape[1] // self.config.group_images, logits.shape[2])
        return logits + self.noise_std * normal(keys_at(keys, "routing noise"), of_image).view_as(logits)


class TokensChoiceRouter(SparseRouter):
    """Each token asks for the K experts with its largest gates; an expert serves as many as it has slots (V-MoE; paper.md 4.1).

    All first choices are served before any second one, and within them tokens in their order, or those with the largest gates
    first (batch priority).
    """

    def decide(self, gates: Gates, slots_per_expert: int, real: Real | None) -> Decisions:
        """As the class says; a token that finds its experts full lies nowhere."""
        G, T, E = gates.shape
        K = self.config.choices
        choices = _largest(gates, K)
        if self.config.tokens_choice.batch_priority:
            priority = _largest(gates.amax(-1), T)
        else:
            priority = torch.arange(T, device=gates.device).expand(G, T)
        asked = choices if real is None else torch.where(real.unsqueeze(-1), choices, E)  # of no expert
        in_order = asked.gather(1, priority.unsqueeze(-1).expand(G, T, K)).mT.flatten(1)  # "G K·T"
        by_expert, request = torch.sort(in_order, dim=1, stable=True)
        bounds = torch.searchsorted(by_expert, torch.arange(E + 1, device=gates.device).expand(G, -1).contiguous())
        at = bounds[:, :-1, None] + torch.arange(slots_per_expert, device=gates.device)
        served = request.gather(1, at.clamp(max=K * T - 1).flatten(1)) % T
        token = torch.where(at < bounds[:, 1:, None], priority.gather(1, served).view_as(at), T)
        return Decisions(token, choices, priority)

    def auxiliary_loss(self, logits: Gates, noisy: Gates, gates: Gates, decisions: Decisions) -> Float[Tensor, " G"]:
        """Importance of the gates without noise, load where there is noise to sample again, GShard's; each with its weight."""
        config, loss = self.config.tokens_choice, logits.new_zeros(logits.shape[0])
        if config.importance_loss:
            loss = loss + config.importance_loss * importance_loss(logits.softmax(-1))
        if config.load_loss and noisy is not logits:
            assert decisions.choices is not None
            loss = loss + config.load_loss * load_loss(logits, noisy, decisions.choices[..., -1:], self.noise_std)
        if config.gshard_loss:
            loss = loss + config.gshard_loss * gshard_loss(gates)
        return loss


class ExpertsChoiceRouter(SparseRouter):
    """Each expert takes the S tokens with the largest gates for it; a token may lie in many slots, or in none (paper.md 4.2)."""

    def decide(self, gates: Gates, slots_per_expert: int, real: Real | None) -> Decisions:
        """As the class says; slots beyond the number of tokens stay empty."""
        T = gates.shape[1]
        wanted = gates.mT if real is None else torch.where(real.unsqueeze(1), gates.mT, -1.0)
        token = _largest(wanted, slots_per_expert)
        token = torch.where(wanted.gather(2, token) < 0, T, token)
        return Decisions(nn.functional.pad(token, (0, slots_per_expert - token.shape[2]), value=T), None, None)


def importance_loss(gates: Gates) -> Float[Tensor, " G"]:
    """(std / mean)² over experts of the sum of their gates."""
    return _variation(gates.sum(1))


def load_loss(logits: Gates, noisy: Gates, last: Int64[Tensor, "G T 1"], noise_std: float) -> Float[Tensor, " G"]:
    """(std / mean)² over experts of the mean chance to be at least a token's K-th choice, `last`, were their noise drawn again."""
    threshold = noisy.gather(-1, last)
    return _variation(torch.special.ndtr((logits - threshold) / noise_std).mean(1))


def gshard_loss(gates: Gates) -> Float[Tensor, " G"]:
    """E² times the mean over experts of (share of tokens whose first choice it is) x (its mean gate)."""
    E = gates.shape[-1]
    first = gates.argmax(-1, keepdim=True) == torch.arange(E, device=gates.device)
    return E**2 * (first.to(gates.dtype).mean(1) * gates.mean(1)).mean(-1)


def _variation(x: Float[Tensor, "G E"]) -> Float[Tensor, " G"]:
    return x.var(-1, correction=0) / x.mean(-1).square()


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last dim are (or all, if fewer), in descending order, equal ones by number.

    topk says nothing about equal ones, and on a GPU chooses its algorithm by the number of rows, which a layout decides.
    """
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :count]
