"""This file owns who writes what of a state: torch's distributed checkpoint plans it, once for a layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint.agreement import agree
from softmoe_train.checkpoint.layout import Box, local_box
from softmoe_train.checkpoint.shards import Part, ShardLayout, shard_layout

Tensors = Mapping[str, Tensor | DTensor]
Whole = dict[str, tuple[tuple[int, ...], torch.dtype]]  # global shape and dtype by name
Held = dict[str, tuple[torch.Size, torch.dtype, Box]]  # global shape, dtype, and the box that a rank holds, by name


@dataclass(frozen=True)
class WritePlan:
    """What this rank writes of a state that it holds as `held`; `whole` is every tensor, on rank 0 (elsewhere empty)."""

    held: Held
    shard: ShardLayout
    whole: Whole

    @property
    def bytes_of_all(self) -> int:
        """What all ranks write together, headers aside; on rank 0."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.whole.values())


def held_of(tensors: Tensors) -> Held:
    """What of `tensors` this rank holds: as long as it is the same on every rank, so is the plan."""
    return {name: (tensor.shape, tensor.dtype, local_box(name, tensor)) for name, tensor in tensors.items()}


def plan_writes(tensors: Tensors, rank: int, group: dist.ProcessGroup | None) -> WritePlan:
    """Plan the writing of `tensors`; every rank calls it and raises CheckpointError alike.

    A box that several ranks hold is written by the one of them that has the fewest bytes so far.
    """
    what = "the save cannot be planned"
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plans = gathered(agree(what, lambda: _without_empty(planner.create_local_plan()), rank, group), rank, group)
    planned = agree(what, lambda: planner.create_global_plan(plans) if rank == 0 else None, rank, group)
    own = _scattered(planned[0] if planned is not None else None, group)
    parts = [_part(item) for item in own.items]
    return WritePlan(held_of(tensors), shard_layout(parts), _whole(planned[1]) if planned is not None else {})


def gathered(own: object, rank: int, group: dist.ProcessGroup | None) -> list:
    """What every rank has, in order, on rank 0; nothing elsewhere."""
    if group is None:
        return [own]
    all_of_them: list | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(own, all_of_them, group=group, group_dst=0)
    return all_of_them or []


def _scattered(plans: list[SavePlan] | None, group: dist.ProcessGroup | None) -> SavePlan:
    if group is None:
        assert plans is not None
        return plans[0]
    own: list[SavePlan] = [SavePlan([])]
    dist.scatter_object_list(own, plans, group=group, group_src=0)
    return own[0]


def _without_empty(plan: SavePlan) -> SavePlan:
    """The plan without the empty boxes of a rank that a cut left with nothing."""
    return replace(plan, items=[item for item in plan.items if _is_needed(item)])


def _is_needed(item: WriteItem) -> bool:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    return math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0


def _part(item: WriteItem) -> Part:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    return Part(item.index.fqn, Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)), data.properties.dtype)


def _whole(metadata: Metadata) -> Whole:
    whole: Whole = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        whole[name] = (tuple(entry.size), entry.properties.dtype)
    return whole
