"""This file owns the MoE layer as the paper writes it: a few einsums and softmaxes, differentiated by autograd alone.

G images  T tokens  D width  E experts  S slots per expert  H hidden
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.keyed import dropout, keys_at, keys_within
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import MoEConfig, SoftConfig
from softmoe_train.model.routing import UNIT_EPS


def plain_layer(layer: MoE, wire: torch.dtype | None, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
    """What `layer` should compute of x ("G T D"), from its settings and weights only (paper Algorithm 1 and 2).

    None of the layer's own code runs: not its products, its backward or its exchange. `wire` is what slots are rounded to on
    their way.
    """
    dispatch, combine = plain_weights(layer.config, dict(layer.router.named_parameters()), x)
    slots = _rounded(torch.einsum("GTES,GTD->GESD", dispatch.to(x.dtype), x), wire)
    weights = {name: p.to(x.dtype) for name, p in layer.experts.named_parameters()}
    outputs = _rounded(_plain_experts(layer.config, weights, slots, keys), wire)
    return torch.einsum("GTES,GESD->GTD", combine.to(x.dtype), outputs), None


def _plain_experts(config: MoEConfig, w: Mapping[str, Tensor], slots: Tensor, keys: Tensor | None) -> Tensor:
    def linear(x: Tensor, weight: str, bias: str) -> Tensor:
        return torch.einsum("GESI,EIO->GESO", x, w[weight]) + w[bias].unsqueeze(1)

    hidden = linear(slots, "w1", "b1")
    if config.expert == "gated_mlp":
        hidden = F.gelu(linear(slots, "wg", "bg"), approximate="tanh") * hidden
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    if config.expert_dropout and keys is not None:
        of_experts = keys_within(keys_at(keys, "expert dropout"), (slots.shape[1],))
        hidden = dropout(hidden, keys_within(of_experts, (slots.shape[2],)), config.expert_dropout)
    return linear(hidden, "w2", "b2")


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
