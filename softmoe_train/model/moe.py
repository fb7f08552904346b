"""This file owns the mixture-of-experts layer: router, experts, and the seam through which slots travel.

B images  T tokens  D width  E experts  S slots per expert  H hidden  G routing groups
R expert ranks  e = E / R local experts  N = R·G·S rows of one expert
"""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from softmoe_train.model.expert_mlp import expert_mlp
from softmoe_train.model.init import InitRule, normal, xavier_uniform
from softmoe_train.model.records import MoEConfig
from softmoe_train.model.routing import SoftRouter
from softmoe_train.model.soft_ablations import AblatedSoftRouter, IdentityRouter
from softmoe_train.model.sparse import ExpertsChoiceRouter, TokensChoiceRouter


@runtime_checkable
class SlotExchange(Protocol):
    """Carries every slot through its expert, wherever that lies, and back; `local` gives the experts' weights of this rank."""

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "G E S D"]: ...

    def local(self, weight: Tensor) -> Tensor: ...


class LocalExchange:
    """The exchange of one process: R = 1, every expert is here."""

    def through(self, slots: Float[Tensor, "G E S D"], compute: Callable[[Tensor], Tensor]) -> Float[Tensor, "G E S D"]:
        """Order the slots by expert, N = G·S rows each, apply `compute` ("E N D" to "E N D"), and order them back."""
        G, E, S, D = slots.shape
        outputs = compute(slots.transpose(0, 1).reshape(E, G * S, D))
        return outputs.view(E, G, S, D).transpose(0, 1)

    def local(self, weight: Tensor) -> Tensor:
        """All of it."""
        return weight


class Experts(nn.Module):
    """E MLPs of the same shape with stacked weights, each applied to its own rows."""

    def __init__(self, num_experts: int, width: int, hidden: int, init: Literal["identical", "independent"]) -> None:
        super().__init__()
        self.init: Literal["identical", "independent"] = init
        self.w1 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.b2 = nn.Parameter(torch.empty(num_experts, width))

    def init_rules(self) -> dict[str, InitRule]:
        """Xavier per expert, tiny biases; all experts alike unless independent (paper.md 1.3)."""
        _, width, hidden = self.w1.shape
        kernel, bias = xavier_uniform(width, hidden), normal(1e-6)
        return {
            name: InitRule(fill, self.init)
            for name, fill in (("w1", kernel), ("b1", bias), ("w2", kernel), ("b2", bias))
        }

    def forward(self, slots: Float[Tensor, "G E S D"], exchange: SlotExchange) -> Float[Tensor, "G E S D"]:
        """Send every slot through its expert and back; computes in the dtype of the slots."""
        w1, b1, w2, b2 = (exchange.local(p) for p in (self.w1, self.b1, self.w2, self.b2))
        return exchange.through(slots, lambda x: expert_mlp(x, w1, b1, w2, b2))


class MoE(nn.Module):
    """A mixture-of-experts layer in place of a dense MLP (paper section 2.1)."""

    def __init__(self, config: MoEConfig, width: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config, width)
        self.experts = Experts(config.num_experts, width, hidden, config.expert_init)
        self.exchange: SlotExchange = LocalExchange()

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int64[Tensor, " B"] | None = None,
        real: Bool[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, " M"] | None]:
        """The tokens after their experts, and what the router tells (`routing.MEASURES`, summed over groups); None if nothing.

        A routing group is `group_images` consecutive images; B is a multiple of it. `keys`, one an image, are what noise is
        derived from; None, in evaluation, means none. Images that are not `real`, if any are not, take no slot from others.
        """
        tokens = x.reshape(-1, self.config.group_images * x.shape[1], x.shape[2])
        # Where nothing competes, an image is a group of its own whether it is real or not.
        routing = self.router(tokens, keys, real) if self.config.is_sparse else self.router(tokens, keys)
        outputs = self.experts(routing.slots, self.exchange)
        return routing.read(outputs).view_as(x), routing.told


def build_router(config: MoEConfig, width: int) -> nn.Module:
    """The router that the settings name."""
    E, S = config.num_experts, config.slots_per_expert
    match config.router:
        case "soft" if config.soft.as_published:
            return SoftRouter(width, E, S)
        case "soft":
            return AblatedSoftRouter(config.soft, width, E, S)
        case "identity":
            return IdentityRouter(E, S)
        case "tokens_choice":
            return TokensChoiceRouter(width, config)
        case "experts_choice":
            return ExpertsChoiceRouter(width, config)
