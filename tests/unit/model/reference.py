"""Soft MoE written as the paper writes it, token by token and slot by slot, to compare against."""

import math
from collections.abc import Callable

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
