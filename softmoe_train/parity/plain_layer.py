"""This file owns the MoE layer as the paper writes it: a few einsums and softmaxes, differentiated by autograd alone.

G images  T tokens  D width  E experts  S slots per expert  H hidden
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.moe import MoE
from softmoe_train.model.records import MoEConfig, SoftConfig
from softmoe_train.model.routing import UNIT_EPS


def plain_layer(layer: MoE, wire: torch.dtype | None, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
    """What `layer` should compute of x ("G T D"), from its weights only (paper Algorithm 1 and 2); nothing is random.

    None of the layer's own code runs: not its products, its backward or its exchange. `wire` is what slots are rounded to on
    their way.
    """
    dispatch, combine = plain_weights(layer.config, dict(layer.router.named_parameters()), x)
    slots = _rounded(torch.einsum("GTES,GTD->GESD", dispatch.to(x.dtype), x), wire)
    w1, b1, w2, b2 = (p.to(x.dtype) for p in (layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2))
    hidden = F.gelu(torch.einsum("GESD,EDH->GESH", slots, w1) + b1.unsqueeze(1), approximate="tanh")
    outputs = _rounded(torch.einsum("GESH,EHD->GESD", hidden, w2) + b2.unsqueeze(1), wire)
    return torch.einsum("GTES,GESD->GTD", combine.to(x.dtype), outputs), None


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
