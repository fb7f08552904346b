"""Soft MoE written as the paper writes it, token by token and slot by slot, to compare against."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def soft_moe_token_by_token(
    x: Tensor, phi: Tensor, scale: float, expert: Callable[[int, Tensor], Tensor], slots_per_expert: int
) -> Tensor:
    """y of one image: x (m, d), phi (d, n·p), slot j belongs to expert j // p (paper section 2.1, Algorithm 1)."""
    m, slots = x.shape[0], phi.shape[1]
    logits = [[scale * cosine(x[i], phi[:, j]) for j in range(slots)] for i in range(m)]
    inputs = []
    for j in range(slots):
        total = sum(math.exp(logits[i][j]) for i in range(m))
        inputs.append(sum(math.exp(logits[i][j]) / total * x[i] for i in range(m)))
    outputs = [expert(j // slots_per_expert, row) for j, row in enumerate(inputs) if isinstance(row, Tensor)]
    rows = []
    for i in range(m):
        total = sum(math.exp(logit) for logit in logits[i])
        rows.append(torch.stack([math.exp(logits[i][j]) / total * outputs[j] for j in range(slots)]).sum(0))
    return torch.stack(rows)


def cosine(a: Tensor, b: Tensor) -> float:
    """<a / |a|, b / |b|> with the released code's epsilon inside each root."""
    return (a @ b).item() / math.sqrt((a @ a).item() + 1e-6) / math.sqrt((b @ b).item() + 1e-6)


def ablated_weights(x: Tensor, router: dict[str, Tensor], soft: dict[str, Any], slots: int) -> tuple[Tensor, Tensor]:
    """Dispatch and combine (m, n·p) of one image under settings of `model.moe.soft`, from the definitions: exp over its sum."""
    m = x.shape[0]

    def scores(name: str) -> Tensor:
        phi = router[name].flatten(1)
        if soft["normalize"]:
            x_, phi = (v / ((v * v).sum(dim, keepdim=True) + 1e-6).sqrt() for v, dim in ((x, 1), (phi, 0)))
        else:
            x_ = x
        return (x_ @ phi * (router["scale"] if soft["scale"] else 1)).exp()

    if soft["dispatch"] == "uniform":
        dispatch = torch.full((m, slots), 1 / m, dtype=x.dtype)
    else:
        dispatch = scores("phi") / scores("phi").sum(0)
    if soft["combine"] == "uniform":
        return dispatch, torch.full((m, slots), 1 / slots, dtype=x.dtype)
    read = scores("combine_phi" if soft["combine"] == "separate" else "phi")
    return dispatch, read / read.sum(1, keepdim=True)


def through_experts(
    dispatch: Tensor, combine: Tensor, x: Tensor, expert: Callable[[int, Tensor], Tensor], p: int
) -> Tensor:
    """y of one image: slot j belongs to expert j // p."""
    inputs = dispatch.T @ x
    return combine @ torch.stack([expert(j // p, row) for j, row in enumerate(inputs)])
