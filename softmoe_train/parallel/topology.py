"""This file owns every device mesh of a run.

W ranks = dp = expert_dp x ep;  R = size of ep
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from softmoe_train.parallel.layout import ParallelConfig, expert_axis, layout_problems, node_size


@dataclass(frozen=True)
class Topology:
    """The meshes of a run. `dp` holds every rank: each reads its own images. `ep` is innermost, so its ranks are neighbours.

    `dense` and `experts` are what FSDP2 shards over: one axis, or (replicate, shard). None leaves copies: of all weights, or
    of the experts that `ep` spreads. `ep_stages`, for a two-stage exchange alone, is `ep` cut in two: between nodes, and
    within a node.
    """

    dp: DeviceMesh
    expert_dp: DeviceMesh
    ep: DeviceMesh
    dense: DeviceMesh | None
    experts: DeviceMesh | None
    ep_stages: tuple[DeviceMesh, DeviceMesh] | None
    size: int

    @classmethod
    def build(
        cls, config: ParallelConfig, *, num_experts: int, device: torch.device, size: int, local_size: int
    ) -> "Topology":
        """Build the meshes over the default process group, which must have `size` ranks, `local_size` of them on a host.

        Raises ValueError as `layout_problems` words it.
        """
        problems = layout_problems(config, num_experts=num_experts, size=size, local_size=local_size)
        if problems:
            raise ValueError("; ".join(problems))
        R = expert_axis(config, num_experts=num_experts, size=size)
        dp = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",))
        root = init_device_mesh(device.type, (size // R, R), mesh_dim_names=("expert_dp", "ep"))
        expert_dp, ep = root["expert_dp"], root["ep"]
        dense = experts = None
        if config.sharding == "fsdp":
            dense, experts = dp, expert_dp
        elif config.shard_size is not None:
            copies = size // config.shard_size
            dense = init_device_mesh(device.type, (copies, config.shard_size), mesh_dim_names=("replicate", "shard"))
            # An axis as wide as a copy spreads the experts enough by itself.
            if config.shard_size > R > 1:
                shape = (copies, config.shard_size // R, R)
                root = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "ep"))
                # FSDP2 takes its mesh and that of the experts from one root.
                experts, ep = root["replicate", "shard"], root["ep"]
        if R == 1 or expert_dp.size() == 1:
            experts = None
        return cls(
            dp=dp,
            expert_dp=expert_dp,
            ep=ep,
            dense=dense,
            experts=experts,
            ep_stages=_stages(config, R, device, size, local_size),
            size=size,
        )


def _stages(
    config: ParallelConfig, R: int, device: torch.device, size: int, local_size: int
) -> tuple[DeviceMesh, DeviceMesh] | None:
    if config.exchange != "two_stage" or R == 1:
        return None
    within = node_size(config, axis=R, local_size=local_size)
    names = ("expert_dp", "ep_between", "ep_within")
    cut = init_device_mesh(device.type, (size // R, R // within, within), mesh_dim_names=names)
    return cut["ep_between"], cut["ep_within"]
