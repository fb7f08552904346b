"""This file owns the two halves of an all-to-all with gradients: issue it, and much later wait for it.

Between the halves the caller computes, and the exchange goes on beneath. Autograd runs its nodes in the reverse order of their
making, so whatever lay between the halves in forward lies between them in backward: `Wait` issues the gradient's exchange there
and `Issue` waits for it. The stock functional all-to-all does both in one node, and nothing can run beneath it in backward.

R ranks of the group
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Stage:
    """One equal-split all-to-all over the group of this name, along one leading dim (of size R) of the rows."""

    group: str
    R: int
    dim: int

    def start(self, rows: Shaped[Tensor, "..."]) -> Shaped[Tensor, "R ..."]:
        """Issue the exchange of any view of `rows`; what returns is in flight, and for `finish` alone."""
        return Issue.apply(rows.movedim(self.dim, 0), self.group, self.R)  # pyright: ignore[reportReturnType]

    def finish(self, flight: Shaped[Tensor, "R ..."]) -> Shaped[Tensor, "..."]:
        """What arrived, `dim` counting the ranks that sent it. Only the current stream waits on a GPU, never the host."""
        return Wait.apply(flight, self.group, self.R).movedim(0, self.dim)  # pyright: ignore[reportOptionalMemberAccess]


class Issue(Function):
    """Issue the all-to-all of dim 0; backward waits for the gradient's, which `Wait` issued."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, R: int) -> Tensor:
        """The result in flight."""
        return _issue(rows, group, R)

    @staticmethod
    def backward(ctx: Any, flight: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient that arrived."""
        return torch.ops._c10d_functional.wait_tensor(flight), None, None


class Wait(Function):
    """Wait for what `Issue` sent; backward issues the same exchange of the gradient: equal splits are their own inverse."""

    @staticmethod
    def forward(ctx: Any, flight: Tensor, group: str, R: int) -> Tensor:
        """The result."""
        ctx.group, ctx.R = group, R
        return torch.ops._c10d_functional.wait_tensor(flight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient's exchange in flight, for `Issue.backward` alone: the node between them is none."""
        return _issue(grad, ctx.group, ctx.R), None, None


def _issue(rows: Tensor, group: str, R: int) -> Tensor:
    assert rows.shape[0] == R, f"{tuple(rows.shape)} for {R} ranks"
    # Contiguous, since the collective sends memory as it lies: with the strides of a permuted gradient the losses stay perfect
    # and the gradients are wrong. The functional collective keeps both buffers alive until it is waited for.
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), [1] * R, [1] * R, group)
