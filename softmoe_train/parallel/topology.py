"""This file owns every device mesh and the arithmetic of the axes.

W ranks = dp = expert_dp x ep;  R = size of ep;  E experts
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from softmoe_train.config import Record


class ParallelConfig(Record):
    """How one copy of the model lies over the ranks."""

    expert_axis: int | Literal["auto"]  # R, ranks that share one set of experts; auto: as many as divide both E and W
    sharding: Literal["replicated", "fsdp"]  # what the expert axis does not cut: a copy on every rank, or FSDP2


@dataclass(frozen=True)
class Topology:
    """The meshes of a run. `dp` holds every rank: each reads its own images. `ep` is innermost, so its ranks are neighbours."""

    dp: DeviceMesh
    expert_dp: DeviceMesh
    ep: DeviceMesh
    size: int

    @classmethod
    def build(cls, config: ParallelConfig, *, num_experts: int, device: torch.device, size: int) -> "Topology":
        """Build the meshes over the default process group, which must have `size` ranks.

        Raises ValueError as `expert_axis_problems` words it.
        """
        problems = expert_axis_problems(config, num_experts=num_experts, size=size)
        if problems:
            raise ValueError("; ".join(problems))
        R = expert_axis(config, num_experts=num_experts, size=size)
        root = init_device_mesh(device.type, (size // R, R), mesh_dim_names=("expert_dp", "ep"))
        dp = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",))
        return cls(dp=dp, expert_dp=root["expert_dp"], ep=root["ep"], size=size)


def expert_axis(config: ParallelConfig, *, num_experts: int, size: int) -> int:
    """R; `auto` is the largest common divisor of experts and ranks (design: slots are few, expert weights are many)."""
    return math.gcd(num_experts, size) if config.expert_axis == "auto" else config.expert_axis


def expert_axis_problems(config: ParallelConfig, *, num_experts: int, size: int) -> list[str]:
    """What is wrong with the expert axis for this many ranks, each with the legal values."""
    R = expert_axis(config, num_experts=num_experts, size=size)
    if R >= 1 and num_experts % R == 0 and size % R == 0:
        return []
    if num_experts == 1:
        return [f"parallel.expert_axis={R}: this model has no experts to spread (model.moe.blocks); use 1 or auto"]
    ranks = f"{size} ranks" if size > 1 else "1 rank"
    fails = [f"model.moe.num_experts={num_experts}"] if R < 1 or num_experts % R else []
    fails += [f"the {ranks} of this run"] if R < 1 or size % R else []
    legal = _divisors(math.gcd(num_experts, size))
    return [
        f"parallel.expert_axis={R} does not divide {' nor '.join(fails)}; {num_experts} experts on {size} {'ranks' if size > 1 else 'rank'} allow {legal}"
    ]


def _divisors(number: int) -> str:
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return divisors[0] if len(divisors) == 1 else ", ".join(divisors[:-1]) + " or " + divisors[-1]
