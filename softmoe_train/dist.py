"""This file owns process groups, rank facts and the reductions that the rest of the house asks for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class World(NamedTuple):
    """Who this process is: one of `size` ranks, one of `local_size` on its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def main(self) -> bool:
        """True on the one process that writes logs."""
        return self.rank == 0


def world_of(environ: dict[str, str] | os._Environ[str]) -> World:
    """The rank facts that a launcher left in the environment; a process alone is rank 0 of 1."""
    numbers = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    return World(*(int(environ.get(key, alone)) for key, alone in numbers))


def pick_device(kind: str, local_rank: int) -> torch.device:
    """`auto` is this rank's accelerator where there is one, else the CPU."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    # Modulo: with one GPU shown to each task, a task of local rank 3 still sees it as device 0.
    device = torch.device(kind, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """The default process group for this device, also for a process alone (so that every layout runs the same code).

    Gloo carries CPU tensors everywhere; NCCL carries those on a GPU.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    failed = True
    try:
        yield
        failed = False
    finally:
        # After a failure other ranks may be inside a collective, and an orderly end would wait for them.
        if not failed or world.size == 1:
            dist.destroy_process_group()


def control_group(world: World) -> dist.ProcessGroup | None:
    """A Gloo group of its own for agreements between hosts (checkpoints); None for a process alone. Collective."""
    if world.size == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), group
    return group


def gather_texts(texts: list[str]) -> list[str]:
    """What all ranks have to say, without repetition, on all ranks."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, texts)
    return list(dict.fromkeys(text for said in gathered for text in said))


def local_values(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank, sharing its storage (no gradient flows through it)."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of `tensor` begins, in every dim of the global tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    # Also right for the strided shards that FSDP2 makes of an expert weight; checkpoints rely on the same call.
    chunks = tensor.__create_chunk_list__()
    return tuple(chunks[0].offsets) if chunks else (0,) * tensor.ndim


def sum_over_world(value: Tensor) -> Tensor:
    """The sum over all ranks, on all ranks; `value` is left alone."""
    total = value.clone()
    dist.all_reduce(total)
    return total


def gather_over_world(value: Tensor) -> Tensor:
    """One row per rank, on all ranks."""
    rows = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, value.contiguous())
    return torch.stack(rows)
