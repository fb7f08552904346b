"""This file owns what a proof measures: how far two tensors are apart, and how far they may be."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.optim.build import OptimConfig

PIECE = 2**24  # values compared at once: bounds the copies in float64
ROUTER_TIES = 1e-4  # relative: gates of equal tokens, float32 whatever the precision, that may come in either order
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # of a stored value, relative


class Tolerances(NamedTuple):
    """The largest relative error that passes, by what is measured."""

    logits: float
    loss: float
    gradients: float
    norm: float
    weights: float
    state: float
    routing: float
    decisions: float  # two gates that are no further apart may come in either order, where tokens are a layer's own
    share: float  # of the whole: a tensor that holds less of it is measured as if it held as much


class Moved(NamedTuple):
    """What an update should do to a tensor, the gradient that weighs its values, and the relative rounding that is forgiven."""

    after: Tensor
    before: Tensor
    gradient: Tensor
    rounding: float

    @property
    def size(self) -> float:
        """How far the update goes, each value counted by the size of its gradient."""
        return sum((g.abs() * (b - start).abs()).sum().item() for b, start, g in _pieces(*self[:3]))


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
    """What each precision allows: several times what was measured over many seeds and shapes, far less than a wrong sum or scale makes.

    float32 against float64: a gradient is a sum of up to millions of products. bf16 against itself: each rank and micro-batch rounds
    its part of a sum (2^-9 relative) before it is added to the others. A wire that is `narrow` rounds both sides alike, but a
    value half-way between two of its own falls to either side. The router is float32 in all of them.
    """
    # The momentum of Adafactor is stored in bf16: a value half-way between two falls to either side.
    state = 2e-3 if optim.kind == "adafactor" else 1e-4
    if precision == "float32" and narrow:
        return Tolerances(
            logits=1e-4, loss=1e-5, gradients=2e-3, norm=1e-3, weights=2e-3, state=4e-3, routing=1e-5, decisions=2e-2, share=1e-2
        )  # fmt: skip
    if precision == "float32":
        return Tolerances(
            logits=1e-5, loss=1e-6, gradients=5e-5, norm=5e-5, weights=1e-4, state=state, routing=1e-5, decisions=1e-4, share=1e-3
        )  # fmt: skip
    return Tolerances(
        logits=1e-2, loss=3e-3, gradients=4e-2, norm=5e-3, weights=2e-2, state=4e-2, routing=1e-5, decisions=1e-1, share=1e-2
    )  # fmt: skip


def size_of(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all of them together."""
    return math.sqrt(sum(part.square().sum().item() for t in tensors for (part,) in _pieces(t)))


def relative(got: float, want: float) -> float:
    """|got - want| / |want|; zero equals only zero."""
    return 0.0 if got == want else abs(got - want) / abs(want) if want else math.inf


def distance(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """The 2-norm of the difference relative to the 2-norm of `want`, or to `least` where that is larger."""
    if got.shape != want.shape:
        return math.inf
    wrong = size = 0.0
    for a, b in _pieces(got, want):
        wrong += (a - b).square().sum().item()
        size += b.square().sum().item()
    return _share(math.sqrt(wrong), max(math.sqrt(size), least))


def move_distance(got: Tensor, want: Moved, least: float = 0.0) -> float:
    """How far an update went astray, relative to how far it goes (or to `least`), each weight counted by the size of its gradient.

    The step of Adam is the rate whatever the gradient's size, so where a gradient is nearer to zero than its own rounding even
    the sign of the step is chance: such weights count as little as their gradient. What cannot be stored does not count.
    """
    if got.shape != want.after.shape:
        return math.inf
    wrong = moved = 0.0
    for a, b, start, g in _pieces(got, want.after, want.before, want.gradient):
        g = g.abs()
        wrong += (g * ((a - b).abs() - want.rounding * b.abs()).clamp(min=0)).sum().item()
        moved += (g * (b - start).abs()).sum().item()
    return _share(wrong, max(moved, least))


def apart(got: Tensor, want: Tensor | Moved, least: float) -> float:
    """`distance`, or `move_distance` of what moves."""
    return distance(got, want, least) if isinstance(want, Tensor) else move_distance(got, want, least)


def least_sizes(want: Mapping[str, Tensor | Moved], share: float) -> dict[str, float]:
    """By name, the size below which a tensor is not measured by its own: a share of all of its kind together.

    Where a gradient is zero by its nature (keys have a bias that softmax does not see), all that can be compared is rounding.
    """
    least: dict[str, float] = {}
    kinds = {name: name.split(".")[1] if name.startswith("optimizer.") else "" for name in want}
    for kind in dict.fromkeys(kinds.values()):
        all_of_it = {name: want[name] for name in want if kinds[name] == kind}
        plain = size_of(t for t in all_of_it.values() if isinstance(t, Tensor))
        moved = sum(t.size for t in all_of_it.values() if isinstance(t, Moved))
        least |= {n: share * (plain if isinstance(t, Tensor) else moved) for n, t in all_of_it.items()}
    return least


def fingerprint(whole: Tensor) -> Tensor:
    """Two integers that differ where any bit of two tensors of a shape does (or nearly surely), and where values are permuted."""
    bits = whole.detach().reshape(-1).contiguous().view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=whole.device)
    for start in range(0, bits.numel(), PIECE):
        part = bits[start : start + PIECE].long()
        place = torch.arange(start, start + part.numel(), device=whole.device) % 65521 + 1  # a prime below 2^16
        total += torch.stack([part.sum(), (part * place).sum()])
    return total


def _share(wrong: float, size: float) -> float:
    return 0.0 if wrong == 0 else wrong / size if size else math.inf


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), PIECE):
        yield tuple(t[start : start + PIECE].to(tensors[0].device, torch.float64) for t in flat)
