"""This file owns the MoE layer as the paper writes it: a few einsums and softmaxes, differentiated by autograd alone.

B images  G routing groups (of Soft MoE: one image each)  T tokens  D width  E experts  S slots per expert  H hidden
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.expert_mlp import OUTPUTS
from softmoe_train.model.keyed import dropout, keys_at, keys_within
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import MoEConfig, SoftConfig
from softmoe_train.model.routing import UNIT_EPS
from softmoe_train.model.sparse import Decisions
from softmoe_train.parity.plain_sparse import plain_sparse


class Followed:
    """The decisions of a layout's sparse router that one process takes over, and how far they are from its own."""

    def __init__(self) -> None:
        self.decided: Decisions | None = None
        self.apart = 0.0


def plain_layer(
    layer: MoE, wire: torch.dtype | None, followed: Followed, x: Tensor, keys: Tensor | None, real: None, seen: None
) -> tuple[Tensor, Tensor | None]:
    """What `layer` should compute of x ("B T D"), from its settings and weights only (paper Algorithm 1 and 2, paper.md 4).

    None of the layer's own code runs: not its products, its backward or its exchange. `wire` is what slots are rounded to on
    their way. All images of a proof are real, and nobody looks on.
    """
    images, told = x, None
    if layer.config.is_sparse:
        x = images.reshape(-1, layer.config.group_images * images.shape[1], images.shape[2])
        assert followed.decided is not None
        routing = plain_sparse(layer.config, layer.router.get_parameter("gate"), x, keys, followed.decided)
        followed.apart = max(followed.apart, routing.apart)
        dispatch, combine, told = routing[:3]
    else:
        dispatch, combine = plain_weights(layer.config, dict(layer.router.named_parameters()), x)
    slots = _rounded(torch.einsum("GTES,GTD->GESD", dispatch.to(x.dtype), x), wire)
    of_groups = None if keys is None else keys[:: layer.config.group_images]
    weights = {name: p.to(x.dtype) for name, p in layer.experts.named_parameters()}
    outputs = _rounded(_plain_experts(layer.config, weights, slots, of_groups), wire)
    return torch.einsum("GTES,GESD->GTD", combine.to(x.dtype), outputs).view_as(images), told


def _plain_experts(config: MoEConfig, w: Mapping[str, Tensor], slots: Tensor, keys: Tensor | None) -> Tensor:
    def linear(x: Tensor, weight: str, bias: str) -> Tensor:
        return torch.einsum("GESI,EIO->GESO", x, w[weight]) + w[bias].unsqueeze(1)

    hidden = linear(slots, "w1", "b1")
    if config.expert == "gated_mlp":
        hidden = F.gelu(linear(slots, "wg", "bg"), approximate="tanh") * hidden
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    if not config.expert_dropout or keys is None:
        return linear(hidden, "w2", "b2")
    of_slots = keys_within(keys_within(keys_at(keys, "expert dropout"), (slots.shape[1],)), (slots.shape[2],))
    outputs = linear(dropout(hidden, of_slots, config.expert_dropout), "w2", "b2")
    return dropout(outputs, keys_at(of_slots, OUTPUTS), config.expert_dropout)


def plain_weights(config: MoEConfig, router: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Both weightings ("G T E S") of the tokens x ("G T D"), from the router's parameters by name, in the wider dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    G, T, E, S = *x.shape[:2], config.num_experts, config.slots_per_expert
    if config.router == "identity":
        eye = torch.eye(T, dtype=wide.dtype, device=x.device).view(T, E, S).expand(G, -1, -1, -1)
        return eye, eye
    soft = config.soft
    logits = {name: _logits(soft, phi, router.get("scale"), wide) for name, phi in router.items() if name != "scale"}
    uniform = wide.new_ones(G, T, E, S)
    dispatch = uniform / T if soft.dispatch == "uniform" else logits["phi"].softmax(1)
    if soft.combine == "uniform":
        return dispatch, uniform / (E * S)
    own = logits["combine_phi" if soft.combine == "separate" else "phi"]
    return dispatch, own.flatten(2).softmax(-1).view_as(own)


def _logits(soft: SoftConfig, phi: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    x, phi = (_unit(x, -1), _unit(phi, 0)) if soft.normalize else (x, phi)
    logits = torch.einsum("GTD,DES->GTES", x, phi)
    return logits if scale is None else logits * scale


def _unit(x: Tensor, dim: int) -> Tensor:
    return x / (x.square().sum(dim, keepdim=True) + UNIT_EPS).sqrt()


def _rounded(x: Tensor, wire: torch.dtype | None) -> Tensor:
    return x if wire is None else x.to(wire).to(x.dtype)
