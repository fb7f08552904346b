"""This file owns process groups, rank facts and the reductions that the rest of the house asks for."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

ControlGroup = dist.ProcessGroup | None  # of Gloo, for agreements between hosts; None for a process alone
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


class World(NamedTuple):
    """Who this process is: one of `size` ranks, one of `local_size` on its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: dist.Store | None = None  # where these ranks have met, and nobody before them; None: as the environment says

    @property
    def main(self) -> bool:
        """True on the one process that writes logs."""
        return self.rank == 0


def world_of(environ: dict[str, str] | os._Environ[str]) -> World:
    """The rank facts that a launcher left in the environment; a process alone is rank 0 of 1."""
    numbers = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, size, local_rank, local_size = (int(environ.get(key, alone)) for key, alone in numbers)
    return World(rank, size, local_rank, local_size)


def pick_device(kind: str, local_rank: int) -> torch.device:
    """`auto` is this rank's accelerator where there is one, else the CPU, for which the process then keeps freed memory."""
    torch.set_float32_matmul_precision("highest")  # the router's float32 means float32, not TF32
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        _keep_freed_memory()
        return torch.device("cpu")
    # Modulo: with one GPU shown to each task, a task of local rank 3 still sees it as device 0.
    device = torch.device(kind, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _keep_freed_memory() -> None:
    """Have glibc's malloc reuse large blocks, as CUDA's allocator does, and not return them to the kernel (elsewhere nothing happens).

    It would map each tensor above 32 MiB afresh: at every step the kernel zeroes gigabytes of gradients, a third of a layer's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """The default process group for this device, also for a process alone (so that every layout runs the same code).

    Gloo carries CPU tensors everywhere; NCCL carries those on a GPU.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=world.size)
    failed = True
    try:
        yield
        failed = False
    finally:
        # After a failure other ranks may be inside a collective, and an orderly end would wait for them.
        if not failed or world.size == 1:
            dist.destroy_process_group()


def control_group(world: World, timeout: timedelta | None = None) -> ControlGroup:
    """A group of its own for agreements between hosts (checkpoints, a request to stop). Collective."""
    if world.size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), group
    return group


def wait_for_all(group: ControlGroup) -> None:
    """Hold the ranks of a control group until all are here, for as long as its own timeout allows."""
    if group is not None:
        dist.barrier(group)


def lengthen_timeouts(seconds: float) -> None:
    """Have every process group made so far wait this long in a collective; NCCL would for 10 minutes, Gloo for 30."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def first_to_fail() -> bool:
    """Whether this rank is the first of its process group to ask, as far as the store by which they met can tell."""
    if not dist.is_initialized():
        return True  # no other rank can have failed because of this one
    try:
        store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        return dist.PrefixStore("failed", store).add("ranks", 1) == 1
    except RuntimeError:  # rank 0 is gone
        return False


class Board:
    """Lines of text that ranks leave for each other beside their process groups, in the store by which they met.

    torchrun and our launcher hold that store in a process of their own; under plain srun it is a thread of rank 0. No call waits
    for another rank, but each would wait for ever for a store whose process is stopped.
    """

    def __init__(self, name: str) -> None:
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.holder = "the launcher on the first host" if agents else "rank 0"
        # A connection of its own: the groups' is locked while one of them waits.
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())  # pyright: ignore[reportAttributeAccessIssue]

    def put(self, key: str, line: str) -> None:
        """Add a line under `key`."""
        self._store.append(key, f"{line}\n")  # pyright: ignore[reportAttributeAccessIssue]
        self._store.add(f"{key}/count", 1)

    def count(self, key: str) -> int:
        """How many lines there are under `key`."""
        return self._store.add(f"{key}/count", 0)

    def lines(self, key: str) -> list[str]:
        """All lines under `key`."""
        return self._store.get(key).decode().splitlines() if self.count(key) else []


class PendingMax:
    """The highest of the ranks' numbers over a control group, under way from here to `wait`; every rank makes and waits for it."""

    def __init__(self, number: int, group: ControlGroup) -> None:
        self._number = torch.tensor(number, device="cpu")
        self._work = (
            dist.all_reduce(self._number, dist.ReduceOp.MAX, group, async_op=True) if group is not None else None
        )

    def wait(self) -> int:
        """The number; waits only for ranks that have not come to where it was made, never for a device."""
        if self._work is not None:
            self._work.wait()
        return int(self._number)


def gather_texts(texts: list[str]) -> list[str]:
    """What all ranks have to say, without repetition, on all ranks."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, texts)
    return list(dict.fromkeys(text for said in gathered for text in said))


def local_values(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank, sharing its storage (no gradient flows through it)."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def global_values(tensor: Tensor) -> Tensor:
    """The whole of `tensor`, on every rank; each rank of its mesh must ask, in the same order."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of `tensor` begins, in every dim of the global tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    # Also right for the strided shards that FSDP2 makes of an expert weight; checkpoints rely on the same call.
    chunks = tensor.__create_chunk_list__()
    return tuple(chunks[0].offsets) if chunks else (0,) * tensor.ndim


def laid_out_as(local: Tensor, like: Tensor) -> Tensor:
    """A local tensor as the shard of a global one, placed as `like` is; itself where `like` is whole."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


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
