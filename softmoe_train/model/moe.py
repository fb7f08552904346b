"""This file owns the mixture-of-experts layer: router, experts, and the seam through which slots travel.

B images  T tokens  D width  E experts  S slots per expert  H hidden  G routing groups
R expert ranks  e = E / R local experts  N = R·G·S rows of one expert
"""

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from softmoe_train.model.expert_mlp import Dropout, expert_mlp, gated_hidden
from softmoe_train.model.init import InitRule, normal, xavier_uniform
from softmoe_train.model.keyed import keys_at, keys_within
from softmoe_train.model.records import MoEConfig
from softmoe_train.model.routing import Routing, SoftRouter
from softmoe_train.model.soft_ablations import AblatedSoftRouter, IdentityRouter
from softmoe_train.model.sparse import ExpertsChoiceRouter, SparseRouting, TokensChoiceRouter

# Makes "e N D" of the rows "e N D" of local experts, and of keys "e R·G", one for each routing group of each expert, or None.
Compute = Callable[[Tensor, Tensor | None], Tensor]
Seen = list[
    Routing | SparseRouting
]  # what routers decided, by block with experts: for whoever looks, outside of training


@runtime_checkable
class SlotExchange(Protocol):
    """Carries every slot through its expert, wherever that lies, and back, with a key for each group and expert where there are some;
    `local` gives the experts' weights of this rank."""

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Compute, keys: Int64[Tensor, "G E"] | None = None
    ) -> Float[Tensor, "G E S D"]: ...

    def local(self, weight: Tensor) -> Tensor: ...


class LocalExchange:
    """The exchange of one process: R = 1, every expert is here."""

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Compute, keys: Int64[Tensor, "G E"] | None = None
    ) -> Float[Tensor, "G E S D"]:
        """Order the slots by expert, N = G·S rows each, apply `compute`, and order them back."""
        G, E, S, D = slots.shape
        outputs = compute(slots.transpose(0, 1).reshape(E, G * S, D), None if keys is None else keys.mT)
        return outputs.view(E, G, S, D).transpose(0, 1)

    def local(self, weight: Tensor) -> Tensor:
        """All of it."""
        return weight


class Experts(nn.Module):
    """E MLPs of the same shape with stacked weights, each applied to its own rows; `wg` and `bg` are those of a gate, if there is one."""

    # Along which dim of each weight the hidden layer lies.
    HIDDEN_DIMS: ClassVar[dict[str, int]] = {"w1": 2, "b1": 1, "wg": 2, "bg": 1, "w2": 1}

    def __init__(self, config: MoEConfig, width: int, hidden: int) -> None:
        super().__init__()
        E, gated = config.num_experts, config.expert == "gated_mlp"
        H = gated_hidden(width, hidden) if gated else hidden
        self.init: Literal["identical", "independent"] = config.expert_init
        self.dropout = config.expert_dropout
        self.w1 = nn.Parameter(torch.empty(E, width, H))
        self.b1 = nn.Parameter(torch.empty(E, H))
        self.wg = nn.Parameter(torch.empty(E, width, H)) if gated else None
        self.bg = nn.Parameter(torch.empty(E, H)) if gated else None
        self.w2 = nn.Parameter(torch.empty(E, H, width))
        self.b2 = nn.Parameter(torch.empty(E, width))

    def init_rules(self) -> dict[str, InitRule]:
        """Xavier per expert, tiny biases; all experts alike unless independent (paper.md 1.3)."""
        _, width, hidden = self.w1.shape
        kernel, bias = xavier_uniform(width, hidden), normal(1e-6)
        return {
            name: InitRule(kernel if name.startswith("w") else bias, self.init)
            for name, _ in self.named_parameters(recurse=False)
        }

    def forward(
        self, slots: Float[Tensor, "G E S D"], exchange: SlotExchange, keys: Int64[Tensor, " G"] | None = None
    ) -> Float[Tensor, "G E S D"]:
        """Send every slot through its expert and back; computes in the dtype of the slots.

        With `keys`, one a group, hidden values and outputs are dropped by (key, expert, slot, value).
        """
        w1, b1, w2, b2 = (exchange.local(p) for p in (self.w1, self.b1, self.w2, self.b2))
        gate = None if self.wg is None or self.bg is None else (exchange.local(self.wg), exchange.local(self.bg))
        S = slots.shape[2]

        def compute(rows: Tensor, keys: Tensor | None) -> Tensor:
            dropped = None if keys is None else Dropout(keys_within(keys, (S,)).flatten(1), self.dropout)
            return expert_mlp(rows, w1, b1, w2, b2, gate, dropped)

        if keys is None or self.dropout == 0:
            return exchange.through(slots, compute)
        return exchange.through(slots, compute, keys_within(keys_at(keys, "expert dropout"), (slots.shape[1],)))


class MoE(nn.Module):
    """A mixture-of-experts layer in place of a dense MLP (paper section 2.1)."""

    def __init__(self, config: MoEConfig, width: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config, width)
        self.experts = Experts(config, width, hidden)
        self.exchange: SlotExchange = LocalExchange()

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int64[Tensor, " B"] | None = None,
        real: Bool[Tensor, " B"] | None = None,
        seen: Seen | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, " M"] | None]:
        """The tokens after their experts, and what the router tells (`routing.MEASURES`, summed over groups); None if nothing.

        A routing group is `group_images` consecutive images; B is a multiple of it. `keys`, one an image, are what noise and
        dropout are derived from; None, in evaluation, means none. Images that are not `real`, if any are not, take no slot from others.
        Where it is `seen`, what the router decided is added there.
        """
        tokens = x.reshape(-1, self.config.group_images * x.shape[1], x.shape[2])
        # Where nothing competes, an image is a group of its own whether it is real or not.
        routing = self.router(tokens, keys, real) if self.config.is_sparse else self.router(tokens, keys)
        if seen is not None:
            seen.append(routing)
        # Of the images of a group the first stands for all: groups begin at fixed global samples.
        of_groups = None if keys is None else keys[:: self.config.group_images]
        outputs = self.experts(routing.slots, self.exchange, of_groups)
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
