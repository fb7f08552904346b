"""This file owns routing: which tokens each slot reads, and which slots each token reads back.

G routing groups (for Soft MoE: one image each)  T tokens  D width  E experts  S slots per expert
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_train.model.init import InitRule, lecun_normal, ones

# Inside the root, as the released code has it; Algorithm 2 adds it outside (paper.md 1.2).
UNIT_EPS = 1e-6


class Routing(NamedTuple):
    """What a router decided: the slots' contents and both weightings, float32."""

    slots: Float[Tensor, "G E S D"]
    dispatch: Float[Tensor, "G T E S"]  # sums to 1 over tokens, for each slot
    combine: Float[Tensor, "G T E S"]  # sums to 1 over all slots, for each token


class SoftRouter(nn.Module):
    """The router of Soft MoE: every slot is a weighted mean of all tokens, every token of all slots (paper Algorithm 1).

    Its parameters, the logits and both softmaxes are float32, whatever the precision of the tokens.
    """

    def __init__(self, width: int, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.empty(width, num_experts, slots_per_expert))
        # Shape (1,), not (): FSDP2 refuses 0-dim parameters.
        self.scale = nn.Parameter(torch.empty(1))

    def init_rules(self) -> dict[str, InitRule]:
        """LeCun-normal slot parameters with fan-in D·E (the released code, paper.md 1.3), scale one."""
        width, num_experts, _ = self.phi.shape
        return {"phi": InitRule(lecun_normal(width * num_experts)), "scale": InitRule(ones)}

    def logits(self, x: Float[Tensor, "G T D"]) -> Float[Tensor, "G T E S"]:
        """scale · <x / |x|, phi / |phi|>, in float32 or wider."""
        if self.phi.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the router's parameters arrived as {self.phi.dtype}; they must stay float32 under every engine"
            )
        wide = x.to(torch.promote_types(x.dtype, self.phi.dtype))
        with torch.autocast(x.device.type, enabled=False):
            phi = self.scale * unit(self.phi, dim=0)
            return torch.einsum("GTD,DES->GTES", unit(wide, dim=-1), phi)

    def forward(self, x: Float[Tensor, "G T D"]) -> Routing:
        """Fill the slots of each group with means of its raw (not normalised) tokens."""
        logits = self.logits(x)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("GTES,GTD->GESD", dispatch.to(x.dtype), x)
        return Routing(slots, dispatch, combine)


def unit(x: Tensor, dim: int) -> Tensor:
    """Scale to length one over `dim`."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + UNIT_EPS)
