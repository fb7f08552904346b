"""The slot exchange: the same values and gradients as one process, and no more traffic than it must have."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_train.dist import local_values
from softmoe_train.model.init import LocalPart, initialize
from softmoe_train.model.moe import LocalExchange, MoE, MoEConfig
from softmoe_train.parallel.exchange import AllToAllExchange
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.topology import ParallelConfig, Topology
from tests.ranks.launch import run_ranks
from tests.ranks.small import build, share

R, E, S, D = 4, 8, 3, 5
G = 2  # groups of each rank


def whole_slots(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(R * G, E, S, D, generator=generator).to(dtype)


def weighting(dtype: torch.dtype) -> Tensor:
    """What each output is multiplied by, so that every gradient is different."""
    return torch.randn(R * G, E, S, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def there_and_back(
    exchange: Any, slots: Tensor, weights: Tensor, expert_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each expert's rows by its own number; the gradient arrives as a view that is not contiguous."""
    slots = slots.detach().requires_grad_()
    rows = exchange.dispatch(slots)
    back = exchange.combine(rows * expert_scale.view(-1, 1, 1), num_groups=slots.shape[0])
    # A transpose before the sum makes the incoming gradient non-contiguous.
    (back.transpose(0, 3) * weights.transpose(0, 3)).sum().backward()
    assert slots.grad is not None
    return rows.detach(), back.detach(), slots.grad


def exchange_on_a_rank(rank: int, world: int, dtype_name: str, contiguous: bool) -> dict[str, Tensor]:
    dtype = getattr(torch, dtype_name)
    mine = slice(rank * G, (rank + 1) * G)
    slots = whole_slots(dtype)[mine]
    if not contiguous:
        slots = slots.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert not slots.is_contiguous()
    group = dist.group.WORLD
    assert group is not None
    scale = torch.arange(1, E + 1, dtype=dtype)[rank * E // R : (rank + 1) * E // R]
    rows, back, grad = there_and_back(AllToAllExchange(group), slots, weighting(dtype)[mine], scale)
    return {"rows": rows, "back": back, "grad": grad}


@pytest.mark.parametrize(("dtype", "contiguous"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_all_to_all_equals_the_local_exchange_bit_for_bit(dtype: str, contiguous: bool) -> None:
    kind = getattr(torch, dtype)
    ranks = run_ranks(exchange_on_a_rank, R, dtype, contiguous)
    rows, back, grad = there_and_back(
        LocalExchange(), whole_slots(kind), weighting(kind), torch.arange(1, E + 1, dtype=kind)
    )
    assert grad.count_nonzero() == grad.numel()
    # Moving values rounds nothing, so exact; rank r holds experts r·e to (r+1)·e, its rows ordered by rank.
    assert torch.equal(torch.cat([r["rows"] for r in ranks]), rows)
    assert torch.equal(torch.cat([r["back"] for r in ranks]), back)
    assert torch.equal(torch.cat([r["grad"] for r in ranks]), grad)


class Traffic(TorchDispatchMode):
    """Counts collectives by name and the bytes that each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.groups: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("_c10d_functional.", "_c10d_functional_autograd.", "c10d.")) and not re.search(
            "wait|wrap", name
        ):
            self.groups.append((name.split(".")[1], _group_name(args)))
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.calls.append((name.split(".")[1], sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def _group_name(args: Any) -> str:
    """The process group of a collective: functional ones are given its name, the others the group itself."""
    for leaf in torch.utils._pytree.tree_leaves(args):
        if isinstance(leaf, str) and leaf not in ("sum", "avg"):
            return leaf
        if isinstance(leaf, torch.ScriptObject):
            return dist.ProcessGroup.unbox(leaf).group_name
    raise AssertionError(f"no group among {args}")


def groups_of_a_training_step(rank: int, world: int) -> tuple[list[tuple[str, str]], str, int]:
    engine = build(rank, world, expert_axis=2, sharding="fsdp")
    (batch,) = share(rank, world)
    with Traffic() as traffic:
        engine.forward_backward(batch, last=True)
        engine.update(0.1)
    return traffic.groups, engine.topology.ep.get_group().group_name, len(traffic.groups)


def test_under_fsdp_the_expert_axis_carries_slots_alone() -> None:
    layers = 2
    for groups, ep, total in run_ranks(groups_of_a_training_step, 4):
        on_ep = [name for name, group in groups if group == ep]
        assert on_ep == ["all_to_all_single"] * 4 * layers
        assert total > len(on_ep), "gathers and reductions of weights, on the other axes, are seen too"
        assert any("gather" in name for name, _ in groups)


def traffic_of_a_step(rank: int, world: int) -> tuple[list, list]:
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    (batch,) = share(rank, world)
    with Traffic() as forward:
        loss = engine.module(batch.images).square().sum()
    with Traffic() as backward:
        loss.backward()
    return forward.calls, backward.calls


@pytest.mark.parametrize("world", [2, 4])
def test_a_layer_moves_its_slots_twice_each_way_and_nothing_else(world: int) -> None:
    images, experts, slots, width, layers = 16 // world, 8, 3, 24, 2
    payload = images * experts * slots * width * 4  # bytes of this rank's slots in float32
    for forward, backward in run_ranks(traffic_of_a_step, world):
        assert forward == [("all_to_all_single", payload)] * 2 * layers
        assert backward == [("all_to_all_single", payload)] * 2 * layers


def layer_on_a_rank(rank: int, world: int, dtype_name: str) -> dict[str, Tensor]:
    """One MoE layer on a non-contiguous input, in the given precision."""
    dtype = getattr(torch, dtype_name)
    config = MoEConfig(blocks=[0], router="soft", num_experts=E, slots_per_expert=S, expert_init="independent")
    topology = Topology.build(
        ParallelConfig(expert_axis=world, sharding="replicated"), num_experts=E, device=torch.device("cpu"), size=world
    )
    with torch.device("meta"):
        layer = MoE(config, width=D, hidden=7)
    shard_experts(layer, topology.ep)
    layer.to_empty(device="cpu")
    first = rank * E // world
    from_here = {"w1", "b1", "w2", "b2"}
    initialize(layer, 0, lambda p: _part(p, first))
    x = torch.randn(D, 6, R * G, generator=torch.Generator().manual_seed(2)).to(dtype)
    per = R * G // world
    mine = x[:, :, rank * per : (rank + 1) * per].permute(2, 1, 0).detach().requires_grad_()
    assert not mine.is_contiguous()
    y = layer(mine)
    y.float().square().sum().backward()
    assert mine.grad is not None
    gradients = {n: p.grad for n, p in layer.named_parameters() if n.split(".")[1] in from_here and p.grad is not None}
    local = {n: g.to_local() if hasattr(g, "to_local") else g for n, g in gradients.items()}  # pyright: ignore
    return {"y": y.detach(), "x.grad": mine.grad, **local}


def _part(parameter: Tensor, first: int) -> Any:

    values = local_values(parameter)
    return LocalPart(values, (first if values.shape != parameter.shape else 0,) + (0,) * (parameter.ndim - 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_layer_on_non_contiguous_inputs_equals_one_process(dtype: str, tolerance: float) -> None:
    # bf16: a row's product does not change with the number of rows, but the order of a sum over rows may.
    (one,), ranks = run_ranks(layer_on_a_rank, 1, dtype), run_ranks(layer_on_a_rank, R, dtype)
    for name, want in one.items():
        got = torch.cat([r[name] for r in ranks])
        error = ((got - want).float().norm() / want.float().norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"
