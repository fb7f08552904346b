"""This file owns the traffic between tokens and slots of limited capacity: a slot holds one token or none, a token lies in any number of slots.

Rows move by index in both directions, forward and backward: no one-hot product, and no atomics, so sums have an order of their own.
G routing groups  T tokens  D width  E experts  S slots per expert  N = G·T tokens and M = G·E·S slots of all groups
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from softmoe_train.model.products import differentiate_once, product_dtype

EMPTY_AT_ONCE = 64


class Seats(NamedTuple):
    """Which token lies in which slot, and the inverse: the slots of token n are `order[offsets[n] : offsets[n + 1]]`."""

    token: Int64[Tensor, "G E S"]  # its number in all groups, N where the slot is empty
    order: Int64[Tensor, " M"]  # slots by their token, empty ones last
    offsets: Int64[Tensor, " N+1"]

    def fill(self, x: Float[Tensor, "G T D"]) -> Float[Tensor, "G E S D"]:
        """The token of each slot; zeros where there is none."""
        slots = _Fill.apply(x.flatten(0, 1), *self)
        assert isinstance(slots, Tensor)
        return slots

    def read(self, outputs: Float[Tensor, "G E S D"], weights: Float[Tensor, "G E S"]) -> Float[Tensor, "N D"]:
        """The weighted sum of each token's slots, in the dtype of the outputs; zeros for a token that lies in none."""
        rows = _Read.apply(outputs, weights, *self)
        assert isinstance(rows, Tensor)
        return rows

    @property
    def slots_of(self) -> Int64[Tensor, " N"]:
        """In how many slots each token lies."""
        return self.offsets.diff()


def seats_of(token: Int64[Tensor, "G E S"], num_tokens: int) -> Seats:
    """The seats of groups of T = `num_tokens` tokens, from each slot's token in its group; T where the slot is empty."""
    G = token.shape[0]
    N = G * num_tokens
    first = torch.arange(0, N, num_tokens, device=token.device).view(G, 1, 1)
    of_all = torch.where(token < num_tokens, token + first, N)
    by_token, order = torch.sort(of_all.flatten(), stable=True)
    return Seats(of_all, order, torch.searchsorted(by_token, torch.arange(N + 1, device=token.device)))


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(order, offsets)
        return _seated(rows, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        differentiate_once()
        order, offsets = ctx.saved_tensors
        return _sums(grad, None, order, offsets), None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, token: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, weights, token)
        return _sums(outputs, weights, order, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        differentiate_once()
        outputs, weights, token = ctx.saved_tensors
        seated = _seated(grad, token)
        wide = weights.dtype
        d_weights = torch.linalg.vecdot(seated.to(wide), outputs.to(wide))
        return seated * weights.to(grad.dtype).unsqueeze(-1), d_weights, None, None, None


def _seated(rows: Tensor, token: Tensor) -> Tensor:
    """The row of each slot's token, zeros where there is none."""
    found = rows[token.clamp(max=rows.shape[0] - 1)]
    # where(), not a product: what is not finite in one image must not reach another's empty slots.
    return torch.where((token < rows.shape[0]).unsqueeze(-1), found, 0.0)


def _sums(slots: Tensor, weights: Tensor | None, order: Tensor, offsets: Tensor) -> Tensor:
    """The (weighted) sum of every token's slots, in the order of the slots."""
    dtype = product_dtype(slots)
    rows = slots.flatten(0, 2)
    M = len(order)
    # What is behind the last offset belongs to the last sum on a GPU (torch 2.13), one thread adding it up: so empty slots
    # get sums of their own, short ones, that nobody reads.
    spare = torch.arange(1, -(-M // EMPTY_AT_ONCE) + 1, device=order.device)
    ends = offsets[-1] + (M - offsets[-1]) * spare // len(spare)
    each = None if weights is None else weights.flatten()[order].to(slots.dtype).to(dtype)
    # A sum over stretches of a list: its kernels add each stretch in order.
    sums = F.embedding_bag(
        order, rows.to(dtype), torch.cat([offsets, ends]), mode="sum", per_sample_weights=each, include_last_offset=True
    )
    return sums[: len(offsets) - 1].to(slots.dtype)
