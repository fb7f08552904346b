"""This file owns routing: which tokens each slot reads, and which slots each token reads back.

G routing groups (for Soft MoE: one image each)  T tokens  D width  E experts  S slots per expert
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softmoe_train.model.init import InitRule, lecun_normal, ones
from softmoe_train.model.products import differentiate_once, mix

# Inside the root, as the released code has it; Algorithm 2 adds it outside (paper.md 1.2).
UNIT_EPS = 1e-6


# What a router may tell of its groups, in the order of `told`.
MEASURES = ("auxiliary_loss", "dropped_tokens", "empty_slots")


class Routing(NamedTuple):
    """What a router decided: the slots' contents and both weightings, float32."""

    slots: Float[Tensor, "G E S D"]
    dispatch: Float[Tensor, "G T E S"]  # sums to 1 over tokens, for each slot
    combine: Float[Tensor, "G T E S"]  # sums to 1 over all slots, for each token

    @property
    def told(self) -> None:
        """Nothing of MEASURES: every token is read, every slot is full."""
        return None

    def read(self, outputs: Float[Tensor, "G E S D"]) -> Float[Tensor, "G T D"]:
        """Each token's weighted mean of all slots."""
        return mix(self.combine.flatten(2), outputs.flatten(1, 2))


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
        return {"phi": phi_rule(self.phi), "scale": scale_rule()}

    def logits(self, x: Float[Tensor, "G T D"]) -> Float[Tensor, "G T E S"]:
        """scale · <x / |x|, phi / |phi|>, in float32 or wider."""
        check_router_dtype(self.phi)
        with torch.autocast(x.device.type, enabled=False):
            return unit_logits(widened(x, self.phi), self.phi, self.scale)

    def forward(self, x: Float[Tensor, "G T D"], keys: Int64[Tensor, " G"] | None = None) -> Routing:
        """Fill the slots of each group with means of its raw (not normalised) tokens; nothing is random here."""
        check_router_dtype(self.phi)
        weightings = _SoftWeights.apply(x, self.phi, self.scale)
        assert isinstance(weightings, tuple)
        dispatch, combine = weightings
        slots = mix(dispatch.flatten(2).mT, x)
        return Routing(slots.unflatten(1, dispatch.shape[2:]), dispatch, combine)


def phi_rule(phi: Tensor) -> InitRule:
    """How slot parameters start: LeCun-normal with fan-in D·E."""
    width, num_experts, _ = phi.shape
    return InitRule(lecun_normal(width * num_experts))


def scale_rule() -> InitRule:
    """How the factor of the logits starts."""
    return InitRule(ones)


def check_router_dtype(parameter: Tensor) -> None:
    """Raise TypeError where an engine hands a router's parameter over in less than float32."""
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the router's parameters arrived as {parameter.dtype}; they must stay float32 under every engine"
        )


class _SoftWeights(torch.autograd.Function):
    """Both softmaxes of the logits. Keeps the tokens as they came and the weightings; recomputes lengths and unit vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            logits = unit_logits(widened(x, phi), phi, scale)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        ctx.save_for_backward(x, phi, scale, dispatch, combine)
        return dispatch, combine

    @staticmethod
    def backward(ctx: Any, d_dispatch: Tensor, d_combine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        differentiate_once()
        x, phi, scale, dispatch, combine = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_logits = _softmax_backward(d_dispatch, dispatch, 1) + _softmax_backward(
                d_combine.flatten(2), combine.flatten(2), 2
            ).view_as(dispatch)
            d_wide, d_phi, d_scale = _logits_backward(d_logits, widened(x, phi), phi, scale)
        return d_wide.to(x.dtype), d_phi, d_scale


def widened(x: Tensor, phi: Tensor) -> Tensor:
    """The tokens in the wider dtype of the two."""
    return x.to(torch.promote_types(x.dtype, phi.dtype))


def _softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    return torch._softmax_backward_data(grad, output, dim, output.dtype)


def _inverse_length(x: Tensor, dim: int) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=dim, keepdim=True).square() + UNIT_EPS)


def unit_logits(x: Float[Tensor, "G T D"], phi: Float[Tensor, "D E S"], scale: Tensor) -> Float[Tensor, "G T E S"]:
    """scale · <x / |x|, phi / |phi|>."""
    # 1 / |x| scales the products: cheaper than scaling the tokens, which are wider.
    unit_phi = phi * _inverse_length(phi, 0)
    return (x.flatten(0, 1) @ (scale * unit_phi).flatten(1)).view(*x.shape[:2], *phi.shape[1:]) * _inverse_length(
        x, -1
    ).unsqueeze(-1)


def _logits_backward(grad: Tensor, x: Tensor, phi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With u = v / |v|: the gradient of v is that of u, less its part along u, divided by |v|."""
    inverse_x, inverse_phi = _inverse_length(x, -1), _inverse_length(phi, 0)
    unit_phi = phi * inverse_phi
    g = (grad * inverse_x.unsqueeze(-1)).flatten(2).flatten(0, 1)
    d_x = (g @ (scale * unit_phi).flatten(1).mT).view_as(x)
    d_x = torch.addcmul(d_x, x, inverse_x.square() * torch.linalg.vecdot(x, d_x).unsqueeze(-1), value=-1)
    d_scaled = (x.flatten(0, 1).mT @ g).view_as(phi)
    along = (d_scaled * unit_phi).sum(0, keepdim=True)
    return d_x, scale * inverse_phi * (d_scaled - unit_phi * along), along.sum().view_as(scale)
