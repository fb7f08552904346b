"""A rank of a thousand opens the files that it needs, and a load of everything opens each file a fixed number of times."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.checkpoint import CheckpointStore
from softmoe_train.checkpoint.manifest import read_manifest, read_mark
from softmoe_train.checkpoint.reader import check_hashes, copy_reads, plan_reads
from tests.unit.checkpoint.cut import save_cut

FILES, E, D = 1000, 2000, 6
EXPERTS = "model.blocks.1.moe.experts.w1"


def values() -> dict[str, torch.Tensor]:
    return {EXPERTS: torch.arange(E * D).view(E, D).float(), "model.lone": torch.arange(5.0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cut(tmp_path_factory.mktemp("many"), 1, values(), {}, FILES)


@contextmanager
def opened() -> Iterator[Counter[str]]:
    """Counts the safetensors files that are opened inside."""
    counts: Counter[str] = Counter()
    inside = True

    def see(event: str, args: tuple) -> None:
        if inside and event == "open" and str(args[0]).endswith(".safetensors"):
            counts[Path(str(args[0])).name] += 1

    sys.addaudithook(see)
    yield counts
    inside = False  # a hook cannot be taken away


def test_a_load_of_everything_opens_each_file_twice(saved: Path) -> None:
    store = CheckpointStore(saved.parent, keep_last=1, rank=0, world=1, group=None)
    tensors = {name: torch.zeros_like(value) for name, value in values().items()}
    with opened() as counts:
        store.load(saved, tensors)
    assert all(torch.equal(tensors[name], value) for name, value in values().items())
    assert len(counts) == FILES
    assert set(counts.values()) == {2}, "once to check, once to copy"


@pytest.mark.parametrize(("world", "rank"), [(1000, 700), (250, 3), (8, 7)])
def test_a_rank_opens_only_the_files_that_hold_its_experts(saved: Path, world: int, rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh, own = init_device_mesh("cpu", (world,)), torch.zeros(E // world, D)
        tensors = {EXPERTS: DTensor.from_local(own, mesh, [Shard(0)], run_check=False)}
        with opened() as counts:
            manifest = read_manifest(saved, read_mark(saved))
            reads = plan_reads(saved, manifest, tensors, "model.blocks")
            check_hashes(saved, manifest, reads)
            copy_reads(saved, reads, tensors)
    finally:
        dist.destroy_process_group()
    assert torch.equal(own, values()[EXPERTS].chunk(world)[rank])
    share = FILES // world
    assert counts == {f"rank_{file:05d}.safetensors": 2 for file in range(rank * share, (rank + 1) * share)}
