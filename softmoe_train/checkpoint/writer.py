"""This file owns saving the tensors: torch's distributed checkpoint plans who writes what, we write it."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from softmoe_train.checkpoint.agreement import CheckpointError, problems_of
from softmoe_train.checkpoint.layout import Box
from softmoe_train.checkpoint.manifest import Manifest, StoredChunk, StoredTensor
from softmoe_train.checkpoint.shards import Part, write_shard


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | DTensor], rank: int, group: dist.ProcessGroup | None
) -> Manifest | None:
    """Write every rank's share of `tensors` into the folder `path`, flushed; rank 0 gets the manifest, others None.

    A box that several ranks hold is written by one of them. If one rank fails, CheckpointError is raised on all.
    """
    writer = _ShardWriter(path, rank)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: that is so
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # raised alike on every rank; not an Exception, so catch it by name
        lines = [line for at, (cause, _) in error.failures.items() for line in problems_of(cause, at)]
        raise CheckpointError(f"{path} was not saved", lines) from error
    return writer.manifest


class _Planner(DefaultSavePlanner):
    """The default plan without the empty boxes of ranks that a cut left with nothing."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[item for item in plan.items if _is_needed(item)])
        return self.plan


class _ShardWriter(StorageWriter):
    """Writes a rank's share as `rank_00003.safetensors`; on rank 0, `manifest` describes the whole afterwards."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.rank = rank
        self.manifest: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        raise AssertionError("a writer serves one folder")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        chunks = []
        if plan.items:
            self.path.mkdir(exist_ok=True)  # rank 0 made it, but a network file system may not show it here yet
            parts = [_part(item, planner) for item in plan.items]
            chunks = write_shard(self.path / f"rank_{self.rank:05d}.safetensors", parts)
        size = 0 if not chunks else (self.path / chunks[0].file).stat().st_size
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, size, chunk) for item, chunk in zip(plan.items, chunks)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[StoredChunk]] = {name: [] for name in metadata.state_dict_metadata}
        files = {}
        for result in (result for of_rank in results for result in of_rank):
            chunks[result.index.fqn].append(result.storage_data)
            files[result.storage_data.file] = result.size_in_bytes
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor(shape=tuple(entry.size), dtype=dtype, chunks=tuple(chunks[name]))
        try:
            self.manifest = Manifest(version=1, files=files, tensors=tensors)
        except ValidationError as error:  # as an error that can travel to the other ranks
            raise CheckpointError("unsound plan", [str(error)]) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _is_needed(item: WriteItem) -> bool:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    return math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0


def _part(item: WriteItem, planner: SavePlanner) -> Part:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return Part(item.index.fqn, box, data.properties.dtype, lambda: planner.resolve_data(item))  # type: ignore[arg-type,return-value]
