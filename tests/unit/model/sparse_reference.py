"""The sparse routers written as loops over tokens and experts, to compare against; differentiated by autograd."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Expert = Callable[[int, Tensor], Tensor]
Seating = dict[int, list[int]]  # the tokens that each expert serves


def gates_of(x: Tensor, gate: Tensor, noise: Tensor | None) -> list[list[Tensor]]:
    """The softmax over experts, by token and expert."""
    gates = []
    for i in range(x.shape[0]):
        logits = [(x[i] * gate[:, e]).sum() + (0 if noise is None else noise[i, e]) for e in range(gate.shape[1])]
        largest = max(logit.item() for logit in logits)
        total = torch.stack([(logit - largest).exp() for logit in logits]).sum()
        gates.append([(logit - largest).exp() / total for logit in logits])
    return gates


def tokens_choose(gates: list[list[Tensor]], top_k: int, capacity: int, batch_priority: bool) -> Seating:
    """All first choices before any second one; in token order, or by the largest gate of each token."""
    tokens = list(range(len(gates)))
    wishes = [sorted(range(len(row)), key=lambda e, row=row: -row[e].item()) for row in gates]
    if batch_priority:
        tokens.sort(key=lambda i: -gates[i][wishes[i][0]].item())
    seating: Seating = {e: [] for e in range(len(gates[0]))}
    for choice in range(top_k):
        for i in tokens:
            e = wishes[i][choice]
            if len(seating[e]) < capacity:
                seating[e].append(i)
    return seating


def experts_choose(gates: list[list[Tensor]], capacity: int) -> Seating:
    """Each expert takes the tokens with the largest gates for it."""
    order = {e: sorted(range(len(gates)), key=lambda i, e=e: -gates[i][e].item()) for e in range(len(gates[0]))}
    return {e: tokens[:capacity] for e, tokens in order.items()}


def layer(x: Tensor, gates: list[list[Tensor]], seating: Seating, expert: Expert) -> Tensor:
    """Each token's sum of its experts' outputs, weighted by its gates."""
    rows = [torch.zeros_like(x[0]) for _ in x]
    for e, tokens in seating.items():
        for i in tokens:
            rows[i] = rows[i] + gates[i][e] * expert(e, x[i])
    return torch.stack(rows)


def variation(values: list[Tensor]) -> Tensor:
    mean = torch.stack(values).mean()
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2  # pyright: ignore[reportReturnType]


def importance(gates: list[list[Tensor]]) -> Tensor:
    return variation([torch.stack([row[e] for row in gates]).sum() for e in range(len(gates[0]))])


def load(logits: Tensor, noise: Tensor, top_k: int, std: float) -> Tensor:
    """The chance that a fresh noise lifts an expert to the threshold of its token, averaged over tokens."""
    chances = []
    for e in range(logits.shape[1]):
        of_tokens = []
        for i in range(logits.shape[0]):
            threshold = (logits[i] + noise[i]).sort(descending=True).values[top_k - 1]
            of_tokens.append(0.5 * torch.erfc((threshold - logits[i, e]) / std / math.sqrt(2)))
        chances.append(torch.stack(of_tokens).mean())
    return variation(chances)


def gshard(gates: list[list[Tensor]]) -> Tensor:
    E, T = len(gates[0]), len(gates)
    firsts = [max(range(E), key=lambda e, row=row: row[e].item()) for row in gates]
    terms = [firsts.count(e) / T * torch.stack([row[e] for row in gates]).mean() for e in range(E)]
    return E**2 * torch.stack(terms).mean()
