"""This file owns the sparse routers as the released code writes them, in one-hot products and counts, given how near-ties fell.

Which of two gates is larger may be decided by rounding, and what follows of it is not small. So the layout's comparisons are taken
over, and it is measured how far each is from what one process finds; all that follows from them is counted here again.
G routing groups  T tokens of a group  D width  E experts  K choices of a token  S slots per expert
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.keyed import keys_at, normal
from softmoe_train.model.records import MoEConfig
from softmoe_train.model.sparse import Decisions


class PlainRouting(NamedTuple):
    """What a sparse router should make of tokens, and how far the decisions that were given are from its own."""

    dispatch: Tensor  # "G T E S", 0 or 1
    combine: Tensor  # "G T E S"
    told: Tensor  # routing.MEASURES, summed over groups
    apart: float  # the largest relative distance of two gates that were given in the other order; inf where the count is wrong


def plain_sparse(config: MoEConfig, gate: Tensor, x: Tensor, keys: Tensor | None, decided: Decisions) -> PlainRouting:
    """From the gate ("D E"), the tokens ("G T D"), a key of each image in training, and the layout's decisions."""
    G, T, E = *x.shape[:2], config.num_experts
    std = config.sparse.noise_std / E
    logits = torch.einsum("GTD,DE->GTE", x.to(torch.promote_types(x.dtype, gate.dtype)), gate)
    noisy = logits
    if keys is not None and std:
        noise = normal(keys_at(keys, "routing noise"), (T // config.group_images, E))
        noisy = logits + std * noise.view(G, T, E).to(logits.dtype)
    gates = noisy.softmax(-1)
    S = config.capacity(T // config.group_images)
    if config.router == "tokens_choice":
        dispatch, apart = _tokens_choice(config, gates.detach(), S, decided)
        auxiliary = _auxiliary(config, logits, noisy, gates, std)
    else:
        dispatch, apart = _experts_choice(gates.detach(), S, decided)
        auxiliary = gates.new_zeros(())
    if not torch.equal(dispatch, _seated(decided.token, T).to(dispatch)):
        apart = math.inf
    dropped = (dispatch.sum((2, 3)) == 0).to(gates.dtype).mean(1).sum()
    empty = 1 - dispatch.sum(1).flatten(1).mean(1)
    return PlainRouting(dispatch, dispatch * gates.unsqueeze(-1), torch.stack([auxiliary, dropped, empty.sum()]), apart)


def _tokens_choice(config: MoEConfig, gates: Tensor, S: int, decided: Decisions) -> tuple[Tensor, float]:
    """Seats by counting who asked before: all first choices, then all second ones, each in the order of priority."""
    choices, order = decided.choices, decided.priority
    assert choices is not None and order is not None
    T, E = gates.shape[1:]
    apart = _difference(gates.gather(2, choices), gates.topk(config.choices).values)
    if config.tokens_choice.batch_priority:
        served = gates.amax(-1).gather(1, order)
        apart = max(apart, _difference(served, served.sort(dim=1, descending=True).values))
    elif not torch.equal(order, torch.arange(T, device=order.device).expand_as(order)):
        apart = math.inf
    if not torch.equal(order.sort(dim=1).values, torch.arange(T, device=order.device).expand_as(order)):
        return gates.new_zeros(*gates.shape, S), math.inf
    asked = F.one_hot(choices, E).gather(1, order[..., None, None].expand(-1, -1, config.choices, E))  # "G T K E"
    requests = asked.transpose(1, 2).flatten(1, 2)  # "G K·T E", the first choices first
    before = requests.cumsum(1) - 1
    seats = requests.unsqueeze(-1) * (before.unsqueeze(-1) == torch.arange(S, device=gates.device))  # "G K·T E S"
    in_order = seats.unflatten(1, (config.choices, T)).sum(1)
    dispatch = torch.zeros_like(in_order).scatter(1, order[..., None, None].expand_as(in_order), in_order)
    return dispatch.to(gates.dtype), apart


def _experts_choice(gates: Tensor, S: int, decided: Decisions) -> tuple[Tensor, float]:
    """The seats that were given, against the largest gates of each expert."""
    T = gates.shape[1]
    taken = min(S, T)
    dispatch = _seated(decided.token, T).to(gates.dtype)
    if dispatch.sum(3).amax() > 1 or not bool((dispatch.sum((1, 3)) == taken).all()):
        return dispatch, math.inf  # a token twice, or too few
    given = torch.einsum("GTES,GTE->GES", dispatch, gates).sort(dim=2, descending=True).values[..., :taken]
    return dispatch, _difference(given, gates.mT.topk(taken).values)


def _seated(token: Tensor, T: int) -> Tensor:
    """Who sits where, as 0 and 1 ("G T E S"), from the token of each slot ("G E S", T where empty)."""
    return F.one_hot(token, T + 1)[..., :T].permute(0, 3, 1, 2)


def _difference(given: Tensor, own: Tensor) -> float:
    largest = torch.where(given == own, 0.0, (given - own).abs() / own).max().item()
    return math.inf if math.isnan(largest) else largest  # max() would pass over what is not a number


def _auxiliary(config: MoEConfig, logits: Tensor, noisy: Tensor, gates: Tensor, std: float) -> Tensor:
    """The weighted losses of all groups (paper.md 4.1), each from its definition."""
    weights, K = config.tokens_choice, config.choices
    importance = _variation(logits.softmax(-1).sum(1))
    first = F.one_hot(gates.argmax(-1), gates.shape[-1]).to(gates.dtype).mean(1)
    gshard = gates.shape[-1] ** 2 * (first * gates.mean(1)).mean(-1)
    losses = weights.importance_loss * importance + weights.gshard_loss * gshard
    if noisy is not logits:
        required = (noisy.topk(K).values[..., -1:] - logits) / std
        chance = 0.5 * torch.erfc(required / math.sqrt(2))
        losses = losses + weights.load_loss * _variation(chance.mean(1))
    return losses.sum()


def _variation(x: Tensor) -> Tensor:
    return (x.std(-1, correction=0) / x.mean(-1)) ** 2
