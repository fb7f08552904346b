"""Meshes of a thousand ranks without a thousand processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.parallel.exchange import build_exchange
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.topology import Topology
from tests.models import moe_config
from tests.ranks.small import parallel_config


def test_what_does_not_fit_builds_no_mesh() -> None:
    with pytest.raises(ValueError, match="expert_axis=6 does not divide"):
        Topology.build(parallel_config(6), num_experts=64, device=torch.device("cpu"), size=16, local_size=8)


def test_two_stages_of_a_thousand_ranks_join_neighbours_first() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=1024)
    try:
        parallel = parallel_config(128, exchange="two_stage")
        topology = Topology.build(parallel, num_experts=128, device=torch.device("cpu"), size=1024, local_size=8)
        assert topology.ep_stages is not None
        between, within = topology.ep_stages
        assert dist.get_process_group_ranks(within.get_group()) == list(range(512, 520))
        first = 517 // 128 * 128
        assert dist.get_process_group_ranks(between.get_group()) == [first + 8 * o + 517 % 8 for o in range(16)]
    finally:
        dist.destroy_process_group()


# (expert axis, shard_size) and the sizes of dense (replicate, shard) and experts (replicate, shard) meshes on 1,024 ranks
@pytest.mark.parametrize(
    ("axis", "shard_size", "experts"), [(1, 8, None), (4, 8, (128, 2)), (8, 8, None), (128, 8, None), (8, 64, (16, 8))]
)
def test_a_hybrid_copy_on_a_thousand_ranks(axis: int, shard_size: int, experts: tuple[int, int] | None) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=1024)
    try:
        layout = parallel_config(axis, "hsdp", shard_size=shard_size)
        topology = Topology.build(layout, num_experts=128, device=torch.device("cpu"), size=1024, local_size=8)
        assert topology.dense is not None
        assert topology.dense.shape == (1024 // shard_size, shard_size)
        assert (topology.experts.shape if topology.experts is not None else None) == experts
        assert (topology.expert_dp.size(), topology.ep.size()) == (1024 // axis, axis)
        assert topology.ep.get_local_rank() == 517 % axis
    finally:
        dist.destroy_process_group()


def test_a_thousand_ranks_each_hold_their_experts() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=1024)
    try:
        topology = Topology.build(
            parallel_config(128), num_experts=128, device=torch.device("cpu"), size=1024, local_size=8
        )
        assert (topology.dp.size(), topology.expert_dp.size(), topology.ep.size()) == (1024, 8, 128)
        assert topology.ep.get_local_rank() == 517 % 128, "ep is innermost: neighbours share a set of experts"
        moe = moe_config(blocks="last 16", router="soft", num_experts=128, slots_per_expert=1, expert_init="identical")
        h14 = ModelConfig(
            image_size=224, patch_size=14, width=1280, depth=32, mlp_dim=5120, num_heads=16, num_classes=29593,
            position_std=0.02, moe=moe,
        )  # fmt: skip
        model = build_model(h14, torch.bfloat16)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        shard_experts(model, topology.ep, build_exchange(parallel_config(128), topology))
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        assert local == 16 * (2 * 1280 * 5120 + 5120 + 1280)
    finally:
        dist.destroy_process_group()
