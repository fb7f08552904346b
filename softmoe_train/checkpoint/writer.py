"""This file owns the writing of a save's tensors: every rank its file, rank 0 the manifest of them all."""

import torch.distributed as dist
from pydantic import ValidationError

from softmoe_train.checkpoint.agreement import CheckpointError, NotFiniteError, agree
from softmoe_train.checkpoint.manifest import Manifest, StoredChunk, StoredTensor
from softmoe_train.checkpoint.plan import Whole, WritePlan, gathered
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.shards import write_shard
from softmoe_train.checkpoint.staging import Staging
from softmoe_train.plain import the_first

Written = tuple[list[str], list[StoredChunk], int]  # names, their chunks, the size of the file


def write_tensors(
    path: Place, plan: WritePlan, staging: Staging, rank: int, group: dist.ProcessGroup | None
) -> Manifest | None:
    """Write every rank's staged part of the state into the folder `path`, flushed; rank 0 gets the manifest, others None.

    If one rank fails, CheckpointError is raised on all; NotFiniteError where values are not finite.
    """
    what = f"{path} was not saved"
    written = agree(what, lambda: _write(path, staging, rank), rank, group)
    results: list[Written] = gathered(written, rank, group)
    return agree(what, lambda: _manifest(plan.whole, results) if rank == 0 else None, rank, group)


def _write(path: Place, staging: Staging, rank: int) -> Written:
    names = [part.name for part in staging.shard.parts]
    if not names:
        return [], [], 0
    path.mkdir(exist_ok=True)  # rank 0 made it, but a network file system may not show it here yet
    file = path / f"rank_{rank:05d}.safetensors"
    chunks, bad = write_shard(file, staging.shard, staging.bytes)
    if bad:
        lines = [f"rank {rank}: {the_first(bad, 5)} hold values that are not finite"]
        raise NotFiniteError(f"{path} was not saved", lines)
    return names, chunks, file.stat().st_size


def _manifest(whole: Whole, results: list[Written]) -> Manifest:
    chunks: dict[str, list[StoredChunk]] = {name: [] for name in whole}
    files = {}
    for names, of_rank, size in results:
        for name, chunk in zip(names, of_rank):
            chunks[name].append(chunk)
            files[chunk.file] = size
    tensors = {
        name: StoredTensor(shape=shape, dtype=str(dtype).removeprefix("torch."), chunks=tuple(chunks[name]))
        for name, (shape, dtype) in whole.items()
    }
    try:
        return Manifest(version=2, files=files, tensors=tensors)
    except ValidationError as error:  # as an error that can travel to the other ranks
        raise CheckpointError("unsound plan", [str(error)]) from error
