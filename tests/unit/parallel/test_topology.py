"""The expert axis: its arithmetic, its refusals, and a mesh of a thousand ranks without a thousand processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.model.moe import MoEConfig
from softmoe_train.model.vit import ModelConfig, build_model
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.topology import ParallelConfig, Topology, expert_axis, expert_axis_problems


def config(axis: int | str) -> ParallelConfig:
    return ParallelConfig(expert_axis=axis, sharding="replicated")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("experts", "ranks", "axis"), [(128, 256, 128), (8, 2, 2), (6, 4, 2), (7, 4, 1), (128, 1, 1)])
def test_auto_takes_the_largest_common_divisor(experts: int, ranks: int, axis: int) -> None:
    assert expert_axis(config("auto"), num_experts=experts, size=ranks) == axis
    assert expert_axis_problems(config("auto"), num_experts=experts, size=ranks) == []


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (
            6,
            "parallel.expert_axis=6 does not divide model.moe.num_experts=64 nor the 16 ranks of this run; 64 experts on 16 ranks allow 1, 2, 4, 8 or 16",
        ),
        (32, "parallel.expert_axis=32 does not divide the 16 ranks"),
        (0, "parallel.expert_axis=0 does not divide"),
        (-2, "parallel.expert_axis=-2 does not divide"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_with_the_legal_ones(axis: int, said: str) -> None:
    (problem,) = expert_axis_problems(config(axis), num_experts=64, size=16)
    assert said in problem
    with pytest.raises(ValueError, match="does not divide"):
        Topology.build(config(axis), num_experts=64, device=torch.device("cpu"), size=16)


def test_a_thousand_ranks_each_hold_their_experts() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=1024)
    try:
        topology = Topology.build(config(128), num_experts=128, device=torch.device("cpu"), size=1024)
        assert (topology.dp.size(), topology.expert_dp.size(), topology.ep.size()) == (1024, 8, 128)
        assert topology.ep.get_local_rank() == 517 % 128, "ep is innermost: neighbours share a set of experts"
        moe = MoEConfig(blocks="last 16", router="soft", num_experts=128, slots_per_expert=1, expert_init="identical")
        h14 = ModelConfig(
            image_size=224, patch_size=14, width=1280, depth=32, mlp_dim=5120, num_heads=16, num_classes=29593,
            position_std=0.02, moe=moe,
        )  # fmt: skip
        model = build_model(h14, torch.bfloat16)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        shard_experts(model, topology.ep)
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        assert local == 16 * (2 * 1280 * 5120 + 5120 + 1280)
    finally:
        dist.destroy_process_group()
