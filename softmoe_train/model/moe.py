"""This file owns the mixture-of-experts layer: router, experts, and the seam through which slots travel.

B images  T tokens  D width  E experts  S slots per expert  H hidden  G routing groups
R expert ranks  e = E / R local experts  N = R·G·S rows of one expert
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from softmoe_train.config import Record
from softmoe_train.model.expert_mlp import expert_mlp
from softmoe_train.model.init import InitRule, normal, xavier_uniform
from softmoe_train.model.products import mix
from softmoe_train.model.routing import SoftRouter


class MoEConfig(Record):
    """The mixture of experts, and the blocks that hold one instead of a dense MLP."""

    blocks: str | list[int]  # "last 6", "every 2", or block numbers from 0; [] is the dense ViT
    router: Literal["soft"]
    num_experts: Annotated[int, Field(ge=1)]
    slots_per_expert: Annotated[int, Field(ge=1)]
    expert_init: Literal["identical", "independent"]


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
        self.router = SoftRouter(width, config.num_experts, config.slots_per_expert)
        self.experts = Experts(config.num_experts, width, hidden, config.expert_init)
        self.exchange: SlotExchange = LocalExchange()

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each image is one routing group: G = B."""
        routing = self.router(x)
        outputs = self.experts(routing.slots, self.exchange)
        return mix(routing.combine.flatten(2), outputs.flatten(1, 2))


def moe_blocks(blocks: str | list[int], depth: int) -> list[int]:
    """The numbers of the blocks that hold experts, ascending.

    "last n" is the last n blocks (the paper's choice, n = depth / 2), "every k" every k-th, ending with the last of each k.
    Raises ValueError for anything else or for a block that is not there.
    """
    if isinstance(blocks, list):
        chosen = sorted(blocks)
    else:
        word, _, number = blocks.partition(" ")
        legal = word in ("last", "every") and re.fullmatch("[0-9]+", number) is not None
        if not legal or not 1 <= int(number) <= depth:
            raise ValueError(
                f"model.moe.blocks={blocks!r} is not 'last n', 'every k' (n and k from 1 to {depth}) or a list of block numbers"
            )
        n = int(number)
        chosen = list(range(depth - n, depth)) if word == "last" else list(range(n - 1, depth, n))
    if len(set(chosen)) != len(chosen) or not all(0 <= i < depth for i in chosen):
        raise ValueError(f"model.moe.blocks={blocks} must name different blocks between 0 and {depth - 1}")
    return chosen
