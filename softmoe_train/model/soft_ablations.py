"""This file owns the ablations of Soft MoE's router (paper App. A and E): uniform, separate and unnormalised weightings, and Identity.

Plain autograd: what they cost beside `SoftRouter` is of no interest. A parameter exists only where something reads it.
G routing groups (one image each)  T tokens  D width  E experts  S slots per expert
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softmoe_train.model.init import InitRule
from softmoe_train.model.products import mix
from softmoe_train.model.records import SoftConfig
from softmoe_train.model.routing import Routing, check_router_dtype, phi_rule, scale_rule, unit_logits, widened


class UniformlyRead(Routing):
    """What a router decided whose combine weights are 1 / (E S)."""

    def read(self, outputs: Float[Tensor, "G E S D"]) -> Float[Tensor, "G T D"]:
        """The mean of all slots, the same for every token."""
        return outputs.flatten(1, 2).mean(1, keepdim=True).expand(-1, self.combine.shape[1], -1)


class AblatedSoftRouter(nn.Module):
    """Soft MoE's router with any other choice of what is learned; its parameters, logits and softmaxes are float32.

    `phi` belongs to every weighting that is learned, `combine_phi` to a separate one for combine, and one `scale` to both.
    """

    def __init__(self, config: SoftConfig, width: int, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        self.config = config
        self.slots_shape = (num_experts, slots_per_expert)
        sizes = (width, num_experts, slots_per_expert)
        phi = "learned" in (config.dispatch, config.combine)
        separate = config.combine == "separate"
        self.phi = nn.Parameter(torch.empty(sizes)) if phi else None
        self.combine_phi = nn.Parameter(torch.empty(sizes)) if separate else None
        self.scale = nn.Parameter(torch.empty(1)) if config.scale and (phi or separate) else None

    def _matrices(self) -> dict[str, nn.Parameter]:
        """The slot parameters that there are."""
        return {name: p for name, p in (("phi", self.phi), ("combine_phi", self.combine_phi)) if p is not None}

    def init_rules(self) -> dict[str, InitRule]:
        """As those of `SoftRouter`, both matrices alike but drawn by themselves."""
        rules = {name: phi_rule(p) for name, p in self._matrices().items()}
        return rules if self.scale is None else {**rules, "scale": scale_rule()}

    def forward(self, x: Float[Tensor, "G T D"], keys: Int64[Tensor, " G"] | None = None) -> Routing:
        """Fill the slots of each group with means of its raw tokens; nothing is random here."""
        logits = {name: self._logits(x, p) for name, p in self._matrices().items()}
        if self.config.dispatch == "uniform":
            dispatch = self._constant(x, 1 / x.shape[1])
            slots = x.mean(1)[:, None, None].expand(-1, *self.slots_shape, -1)
        else:
            dispatch = logits["phi"].softmax(1)
            slots = mix(dispatch.flatten(2).mT, x).unflatten(1, self.slots_shape)
        if self.config.combine == "uniform":
            return UniformlyRead(slots, dispatch, self._constant(x, 1 / (self.slots_shape[0] * self.slots_shape[1])))
        own = logits["combine_phi" if self.config.combine == "separate" else "phi"]
        return Routing(slots, dispatch, own.flatten(2).softmax(-1).view_as(own))

    def _logits(self, x: Float[Tensor, "G T D"], phi: nn.Parameter) -> Float[Tensor, "G T E S"]:
        """scale · <x, phi>, of unit lengths where they are normalised."""
        check_router_dtype(phi)
        with torch.autocast(x.device.type, enabled=False):
            x = widened(x, phi)
            scale = phi.new_ones(1) if self.scale is None else self.scale
            if self.config.normalize:
                return unit_logits(x, phi, scale)
            return (x.flatten(0, 1) @ (scale * phi).flatten(1)).view(*x.shape[:2], *phi.shape[1:])

    def _constant(self, x: Tensor, value: float) -> Float[Tensor, "G T E S"]:
        """The same weight everywhere, in no memory; float32 as of every router."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.full((), value, dtype=wide, device=x.device).expand(*x.shape[:2], *self.slots_shape)


class IdentityRouting(Routing):
    """What Identity decides: no weights to multiply by."""

    def read(self, outputs: Float[Tensor, "G E S D"]) -> Float[Tensor, "G T D"]:
        """Token i is what became of slot i."""
        return outputs.flatten(1, 2)


class IdentityRouter(nn.Module):
    """Token i is slot i, in the order of slots that the paper's equations have: expert i // S. T = E S, and no parameters.

    Both weightings are identity matrices then, as the paper says. (Its "round-robin" would give expert i mod E, which differs
    where S > 1 alone, and then only by the order in which experts are numbered.)
    """

    def __init__(self, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        self.slots_shape = (num_experts, slots_per_expert)

    def forward(self, x: Float[Tensor, "G T D"], keys: Int64[Tensor, " G"] | None = None) -> Routing:
        """Each token in the slot of its own."""
        slots = x.unflatten(1, self.slots_shape)
        eye = torch.eye(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        weights = eye.unflatten(1, self.slots_shape).expand(len(x), -1, -1, -1)
        return IdentityRouting(slots, weights, weights)
