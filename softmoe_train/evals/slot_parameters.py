"""This file owns what is measured of a router's own parameters: its scale, and the lengths and directions of its slot parameters.

D width  E experts  S slots per expert  M = E S slots
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

MATRICES = ("phi", "combine_phi", "gate")  # "D E S", or "D E" of sparse routers


def parameter_measures(router: nn.Module) -> dict[str, float]:
    """The scale, and of each matrix lengths of columns and products of unit columns, within and across experts (paper Figs. 28 to 30)."""
    parameters = {name: p.detach() for name, p in router.named_parameters()}
    measures = {"scale": parameters["scale"].item()} if "scale" in parameters else {}
    for name in MATRICES:
        if name in parameters:
            measures |= {f"{name}_{measure}": value for measure, value in _of_columns(parameters[name]).items()}
    return measures


def slot_products(columns: Float[Tensor, "D ..."]) -> Float[Tensor, "M M"]:
    """The inner products of slot parameters of unit length, slots in their order; a column of zeros has none."""
    columns = columns.flatten(1)
    unit = columns / torch.linalg.vector_norm(columns, dim=0).clamp(min=1e-30)
    return unit.mT @ unit


def _of_columns(columns: Tensor) -> dict[str, float]:
    lengths = torch.linalg.vector_norm(columns.flatten(1), dim=0)
    measures = {"norm_min": lengths.min(), "norm_mean": lengths.mean(), "norm_max": lengths.max()}
    E, S = columns.shape[1], columns[0, 0].numel()
    products = slot_products(columns).view(E, S, E, S)
    own = torch.eye(E, dtype=torch.bool, device=columns.device)[:, None, :, None].expand(E, S, E, S)
    itself = torch.eye(E * S, dtype=torch.bool, device=columns.device).view(E, S, E, S)
    for name, pairs in (("within", own & ~itself), ("across", ~own)):
        chosen = products[pairs]
        if len(chosen):
            measures |= {f"similarity_{name}_mean": chosen.mean(), f"similarity_{name}_max": chosen.max()}
    return {name: value.item() for name, value in measures.items()}
