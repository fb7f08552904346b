"""Every layout equals one process: outputs, loss, every gradient, the global norm, the weights after a clipped step."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks.launch import run_ranks
from tests.ranks.small import LR, build, reference, share

# float32 against float64: a gradient is a sum of a few thousand products.
TOLERANCE = 1e-5


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(rank: int, world: int, expert_axis: int, sharding: str, micro_batches: int) -> dict[str, Any]:
    engine = build(rank, world, expert_axis, sharding)
    batches = share(rank, world, micro_batches)
    logits = torch.cat([engine.module(b.images).detach() for b in batches])
    losses = [engine.forward_backward(b, last=b is batches[-1]) for b in batches]
    gradients = {name: full(g) for name, g in engine.reduce().items()}
    again = build(rank, world, expert_axis, sharding)
    for b in batches:
        again.forward_backward(b, last=b is batches[-1])
    stats = again.update(LR)
    return {
        "logits": logits,
        "loss": torch.stack(losses).sum().item(),
        "norm": stats.norm.item(),
        "gradients": gradients,
        "weights": {name: full(p) for name, p in again.parameters.items()},
        "sizes": {
            name: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for name, p in again.parameters.items()
        },
    }


truth = cache(reference)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


LAYOUTS = [
    (world, axis, sharding, micro)
    for world in (1, 2, 4)
    for axis in (1, 2, 4)
    if axis <= world
    for sharding in ("replicated", "fsdp")
    for micro in ((1, 2) if world == 2 else (1,))
]


def all_layouts(rank: int, world: int) -> dict[tuple, dict[str, Any]]:
    return {layout: one_step(rank, *layout) for layout in LAYOUTS if layout[0] == world}


@cache
def results(world: int) -> list[dict[tuple, dict[str, Any]]]:
    """One start of the processes serves all layouts of this many ranks."""
    return run_ranks(all_layouts, world)


@pytest.mark.parametrize(("world", "axis", "sharding", "micro"), LAYOUTS)
def test_a_layout_equals_one_process_in_float64(world: int, axis: int, sharding: str, micro: int) -> None:
    want = truth()
    ranks = [r[world, axis, sharding, micro] for r in results(world)]
    got = ranks[0]
    logits = torch.cat([r["logits"] for r in ranks])
    torch.testing.assert_close(logits.double(), want["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(r["loss"] for r in ranks) == pytest.approx(want["loss"], rel=1e-6)
    assert set(got["gradients"]) == set(want["gradients"])
    zero = [name for name, g in want["gradients"].items() if not g.any()]
    assert zero == [], "a gradient that is zero compares nothing"
    worst = max(want["gradients"], key=lambda name: relative(got["gradients"][name], want["gradients"][name]))
    error = relative(got["gradients"][worst], want["gradients"][worst])
    assert error < TOLERANCE, f"{worst}: {error:.1e}"
    for r in ranks:
        assert r["norm"] == pytest.approx(want["norm"], rel=TOLERANCE)
    far = {
        name: distance
        for name, weight in want["weights"].items()
        if (distance := (got["weights"][name].double() - weight).abs().max().item()) > 1e-6
    }
    assert far == {}, "weights after the step, up to the rounding of float32 values near 1"
    print(
        f"| {world} | {axis} | {sharding} | {micro} | {error:.1e} {worst} | {abs(got['norm'] / want['norm'] - 1):.1e} |"
    )
