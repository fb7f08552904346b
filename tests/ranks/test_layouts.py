"""Every layout equals one process: outputs, loss, every gradient, the global norm, the weights after a clipped step."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.engine.torch_engine import TorchEngine
from tests.ranks.launch import run_ranks
from tests.ranks.small import LR, build, multi_hot, reference, share

# float32 against float64: a gradient is a sum of a few thousand products.
TOLERANCE = 1e-5


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Layout(NamedTuple):
    world: int
    axis: int
    sharding: str
    micro_batches: int = 1
    num_experts: int = 8
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.world} | {self.axis} | {self.sharding} | {self.micro_batches} | " + " ".join(
            [f"{self.num_experts} experts", *(f"{key}={value}" for key, value in self.options)]
        )


def engine_of(rank: int, layout: Layout) -> TorchEngine:
    return build(
        rank, layout.world, layout.axis, layout.sharding, num_experts=layout.num_experts, **dict(layout.options)
    )


def one_step(rank: int, world: int, layout: Layout) -> dict[str, Any]:
    engine = engine_of(rank, layout)
    batches = share(rank, layout.world, layout.micro_batches)
    logits = torch.cat([engine.module(b.images).logits.detach() for b in batches])
    losses = [engine.forward_backward(b, last=b is batches[-1]) for b in batches]
    gradients = {name: full(g) for name, g in engine.gradients().items()}
    again = engine_of(rank, layout)
    for b in batches:
        again.forward_backward(b, last=b is batches[-1])
    stats = again.update(LR)
    return {
        "logits": logits,
        "loss": torch.stack(losses).sum().item(),
        "norm": stats.norm.item(),
        "gradients": gradients,
        "weights": {name: full(p) for name, p in again.parameters.items()},
    }


truth = cache(reference)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def options(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


# Every sharding with and without accumulation; experts whole, cut, and both cut and copied.
LAYOUTS = [
    Layout(1, 1, "replicated"),
    Layout(1, 1, "fsdp"),
    Layout(2, 1, "replicated", 2),
    Layout(2, 1, "fsdp"),
    Layout(2, 2, "replicated"),
    Layout(2, 2, "fsdp", 2),
    Layout(4, 2, "replicated"),
    Layout(4, 2, "fsdp"),
    Layout(4, 4, "fsdp"),
    Layout(4, 1, "hsdp", 2, options=options(shard_size=2)),
    Layout(4, 1, "fsdp", num_experts=2),  # fewer experts than ranks that shard them: cut inside each expert
    Layout(4, 2, "fsdp", num_experts=2),
    Layout(4, 2, "replicated", num_experts=2),
    Layout(4, 1, "hsdp", 2, num_experts=1, options=options(shard_size=2, reduce_each_micro=True)),
    Layout(2, 1, "fsdp", 2, options=options(reduce_each_micro=True, prefetch=1, recompute="moe")),
    Layout(4, 2, "fsdp", 2, options=options(reduce_each_micro=True, prefetch=2, recompute="block")),
    Layout(4, 2, "hsdp", 2, options=options(shard_size=2, prefetch=1, recompute="moe")),
    Layout(2, 2, "replicated", 2, options=options(recompute="block")),
]
# The rest of the product, of which test_matrix.py covers all pairs, too.
MORE = [
    layout
    for world in (1, 2, 4)
    for axis in (1, 2, 4)
    for sharding in ("replicated", "fsdp", "hsdp")
    for micro in (1, 2)
    if axis <= world and (sharding != "hsdp" or world == 4)
    for layout in [Layout(world, axis, sharding, micro, options=options(shard_size=2) if sharding == "hsdp" else ())]
    if layout not in LAYOUTS
]


def all_layouts(rank: int, world: int, layouts: list[Layout]) -> dict[Layout, dict[str, Any]]:
    return {layout: one_step(rank, world, layout) for layout in layouts if layout.world == world}


@cache
def results(world: int, *, more: bool) -> list[dict[Layout, dict[str, Any]]]:
    """One start of the processes serves all layouts of this many ranks."""
    return run_ranks(all_layouts, world, MORE if more else LAYOUTS)


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.full) for layout in MORE)], ids=str
)
def test_a_layout_equals_one_process_in_float64(layout: Layout) -> None:
    want = truth(num_experts=layout.num_experts)
    ranks = [r[layout] for r in results(layout.world, more=layout in MORE)]
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
    far = {}
    for name, weight in want["weights"].items():
        moved = weight - want["weights_before"][name]
        wrong = (got["weights"][name].double() - weight).norm()
        # To the rounding of a float32 weight, which is what limits how well a small move can be seen.
        if wrong > 2e-5 * moved.norm() + 6e-8 * weight.norm():
            far[name] = (wrong / moved.norm()).item()
    assert far == {}
    norm = abs(got["norm"] / want["norm"] - 1)
    weights = max((got["weights"][n].double() - w).abs().max().item() for n, w in want["weights"].items())
    print(f"| {layout} | {error:.1e} {worst} | {norm:.1e} | {weights:.1e} |")


def softmax_step(rank: int, world: int) -> tuple[dict[str, Tensor], float]:
    engine = build(rank, world, 2, "fsdp", loss="softmax")
    batches = [multi_hot(b) for b in share(rank, world, 2)]
    losses = [engine.forward_backward(b, last=b is batches[-1]) for b in batches]
    return {name: full(g) for name, g in engine.gradients().items()}, torch.stack(losses).sum().item()


def test_softmax_with_several_labels_equals_one_process_in_float64() -> None:
    want = reference("softmax")
    ranks = run_ranks(softmax_step, 4)
    assert sum(loss for _, loss in ranks) == pytest.approx(want["loss"], rel=1e-6)
    for name, gradient in want["gradients"].items():
        assert relative(ranks[0][0][name], gradient) < TOLERANCE, name


def fresh(rank: int, world: int) -> dict[tuple[int, str, str], dict[str, Tensor]]:
    """The weights that a run starts from, by layout and kind of expert start."""
    return {
        (axis, sharding, start): {
            name: full(p)
            for name, p in build(rank, world, axis, sharding, expert_init=start, perturbed=False).parameters.items()
        }
        for axis in (1, 2, 4)
        if axis <= world
        for sharding in ("replicated", "fsdp")
        for start in ("identical", "independent")
        # How experts start matters where they are cut, and all layouts of four ranks start the harder way.
        if world < 4 or start == "independent"
    }


def test_the_same_seed_gives_the_same_global_weights_on_every_layout() -> None:
    one = run_ranks(fresh, 1)[0]
    for world in (2, 4):
        for (_, _, start), weights in run_ranks(fresh, world)[0].items():
            want = one[1, "replicated", start]
            assert weights.keys() == want.keys()
            assert all(torch.equal(weights[name], want[name]) for name in want)
    w1 = {start: one[1, "replicated", start]["blocks.1.moe.experts.w1"] for start in ("identical", "independent")}
    assert torch.equal(w1["identical"][0], w1["identical"][7])
    assert not torch.equal(w1["independent"][0], w1["independent"][7])
