"""This file owns what a proof measures: how far two tensors are apart, and how far they may be."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.optim.build import OptimConfig

PIECE = 2**24  # values compared at once: bounds the copies in float64
ROUNDING = 2.0**-24  # of a value stored in float32, relative


class Tolerances(NamedTuple):
    """The largest relative error that passes, by what is measured."""

    logits: float
    loss: float
    gradients: float
    scalars: float  # gradients that are one number: a sum of millions of terms that nearly cancel
    norm: float
    weights: float
    state: float
    second: float  # the factor on all of these at the second update, where each side goes on from its own first


class Moved(NamedTuple):
    """What an update should do to a tensor, the gradient that weighs its values, and how often a side may round them."""

    after: Tensor
    before: Tensor
    gradient: Tensor
    roundings: int


class Row(NamedTuple):
    """One line of the proof. `errors` holds what was measured by name, in the order of the model; one entry at least."""

    what: str
    tolerance: float
    errors: dict[str, float]

    @property
    def worst(self) -> str:
        """The name with the largest error; one that is not a number is larger than any."""
        return max(self.errors, key=lambda name: math.inf if math.isnan(self.errors[name]) else self.errors[name])

    @property
    def failing(self) -> list[str]:
        """The names above the tolerance, those first that backward reaches first: the nearest to the cause."""
        return [name for name, error in reversed(self.errors.items()) if not error <= self.tolerance]


def tolerances(precision: str, optim: OptimConfig, *, narrow: bool = False) -> Tolerances:
    """What each precision allows: several times what was measured for S/16, far less than any wrong sum or scale makes.

    float32 against float64: a gradient is a sum of up to millions of products. bf16 against itself: each rank and micro-batch rounds
    its part of a sum (2^-9 relative) before it is added to the others. The moves of Adam are compared where their sign is no
    chance, so they are tighter than their gradients; but chance moved the other weights, which the second update feels. A wire
    that is `narrow` rounds both sides alike, but a value half-way between two of its own falls to either side.
    """
    adaptive = optim.kind != "sgd"
    # The momentum of Adafactor is stored in bf16: a value half-way between two falls to either side.
    state = 2e-3 if optim.kind == "adafactor" else 1e-4
    if precision == "float32" and narrow:
        return Tolerances(
            logits=1e-4, loss=1e-5, gradients=2e-3, scalars=1e-2, norm=1e-3, weights=2e-3, state=4e-3, second=10.0
        )
    if precision == "float32":
        return Tolerances(
            logits=1e-5, loss=1e-6, gradients=5e-5, scalars=1e-3, norm=5e-5, weights=1e-4, state=state,
            second=100.0 if adaptive else 10.0,
        )  # fmt: skip
    return Tolerances(
        logits=2e-2, loss=1e-3, gradients=2e-2, scalars=1e-1, norm=1e-2, weights=5e-2, state=4e-2, second=5.0
    )


def relative(got: float, want: float) -> float:
    """|got - want| / |want|; zero equals only zero."""
    return 0.0 if got == want else abs(got - want) / abs(want) if want else math.inf


def distance(got: Tensor, want: Tensor) -> float:
    """The 2-norm of the difference relative to the 2-norm of `want`."""
    if got.shape != want.shape:
        return math.inf
    wrong = size = 0.0
    for a, b in _pieces(got, want):
        wrong += (a - b).square().sum().item()
        size += b.square().sum().item()
    return relative(math.sqrt(size) + math.sqrt(wrong), math.sqrt(size))


def move_distance(got: Tensor, want: Moved) -> float:
    """How far an update went astray, relative to how far it goes, each weight counted by the size of its gradient.

    The step of Adam is the rate whatever the gradient's size, so where a gradient is nearer to zero than its own rounding even
    the sign of the step is chance: such weights count as little as their gradient. What float32 cannot store does not count.
    """
    if got.shape != want.after.shape:
        return math.inf
    wrong = moved = 0.0
    for a, b, start, g in _pieces(got, want.after, want.before, want.gradient):
        g = g.abs()
        wrong += (g * ((a - b).abs() - want.roundings * ROUNDING * b.abs()).clamp(min=0)).sum().item()
        moved += (g * (b - start).abs()).sum().item()
    return relative(moved + wrong, moved)


def fingerprint(whole: Tensor) -> Tensor:
    """Two integers that differ where any bit of two tensors of a shape does (or nearly surely), and where values are permuted."""
    bits = whole.detach().reshape(-1).contiguous().view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=whole.device)
    for start in range(0, bits.numel(), PIECE):
        part = bits[start : start + PIECE].long()
        place = torch.arange(start, start + part.numel(), device=whole.device) % 65521 + 1  # a prime below 2^16
        total += torch.stack([part.sum(), (part * place).sum()])
    return total


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), PIECE):
        yield tuple(t[start : start + PIECE].to(tensors[0].device, torch.float64) for t in flat)
