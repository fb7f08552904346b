"""This file owns the MoE layer as the paper writes it: a few einsums and softmaxes, differentiated by autograd alone.

G images  T tokens  D width  E experts  S slots per expert  H hidden
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.moe import MoE
from softmoe_train.model.routing import UNIT_EPS


def plain_layer(layer: MoE, wire: torch.dtype | None, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
    """What `layer` should compute of x ("G T D"), from its weights only (paper Algorithm 1 and 2); nothing is random.

    None of the layer's own code runs: not its products, its backward or its exchange. `wire` is what slots are rounded to on
    their way.
    """
    dispatch, combine = plain_weights(layer.router.phi, layer.router.scale, x)
    slots = _rounded(torch.einsum("GTES,GTD->GESD", dispatch.to(x.dtype), x), wire)
    w1, b1, w2, b2 = (p.to(x.dtype) for p in (layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2))
    hidden = F.gelu(torch.einsum("GESD,EDH->GESH", slots, w1) + b1.unsqueeze(1), approximate="tanh")
    outputs = _rounded(torch.einsum("GESH,EHD->GESD", hidden, w2) + b2.unsqueeze(1), wire)
    return torch.einsum("GTES,GESD->GTD", combine.to(x.dtype), outputs), None


def plain_weights(phi: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both weightings ("G T E S") of the tokens x ("G T D"), in the wider dtype of the two."""
    wide = x.to(torch.promote_types(x.dtype, phi.dtype))
    logits = torch.einsum("GTD,DES->GTES", _unit(wide, -1), scale * _unit(phi, 0))
    return logits.softmax(1), logits.flatten(2).softmax(-1).view_as(logits)


def _unit(x: Tensor, dim: int) -> Tensor:
    return x / (x.square().sum(dim, keepdim=True) + UNIT_EPS).sqrt()


def _rounded(x: Tensor, wire: torch.dtype | None) -> Tensor:
    return x if wire is None else x.to(wire).to(x.dtype)
