"""This file owns `bench checkpoint`: what a save costs the training, and how fast a checkpoint is written and loaded, beside the
memory and the disk."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from softmoe_train.bench.rounds import Side, Timings, measure, no_reset, timed
from softmoe_train.bench.settings import CheckpointSettings
from softmoe_train.bench.table import Outcome, mebibytes, milliseconds, progress, ratio
from softmoe_train.checkpoint.folder import delete
from softmoe_train.checkpoint.manifest import read_manifest, read_mark
from softmoe_train.checkpoint.reader import plan_reads
from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.dist import World, control_group, gather_texts
from softmoe_train.run import build_engine, build_topology
from softmoe_train.settings import RunConfig

BLOCK = 16 * 2**20  # bytes of a bare read
COPY, BLOCKING, DD, WRITE, READ, LOAD = "copy", "blocking", "dd", "write", "cold read", "load"
BESIDE = {BLOCKING: COPY, WRITE: DD, LOAD: READ}


class Sizes(NamedTuple):
    """Bytes of this rank."""

    written: int
    read: int


def checkpoint_problems() -> list[str]:
    """Why there would be nothing to compare with."""
    if shutil.which("dd") is None:
        return ["bench checkpoint compares with dd, which is not on the path; install coreutils"]
    return []


def bench_checkpoint(settings: CheckpointSettings, config: RunConfig, world: World, device: torch.device) -> Outcome:
    """Measure on every rank of the default process group, in a folder that is deleted afterwards."""
    engine = build_engine(config, build_topology(config, world, device), device)
    tensors = engine.state_dict()
    with _folder(settings.folder, world) as folder:
        store = CheckpointStore(
            folder / "checkpoints", keep_last=10**9, rank=world.rank, world=world.size, group=control_group(world)
        )
        store.prepare(tensors)
        first = timed(lambda: store.begin(1, tensors, {}), device)
        path = store.settle()
        assert isinstance(path, Path), path
        reads = plan_reads(path, read_manifest(path, read_mark(path)), tensors, "")
        files = sorted({path / read.chunk.file for read in reads})
        sides = _sides(store, tensors, files, folder, world, device)
        with progress(settings.rounds + settings.warmup, shown=world.main) as advance:
            timings = measure(
                sides,
                device=device,
                rounds=settings.rounds,
                warmup=settings.warmup,
                ready=lambda: _cool(files),
                after=lambda: advance("checkpoint"),
            )
        sizes = Sizes(store.staged_bytes, sum(file.stat().st_size for file in files))
        dist.barrier()
    return _outcome(timings, first, sizes, settings, world)


@contextmanager
def _folder(where: str, world: World) -> Iterator[Path]:
    """A new folder that all ranks see, gone at the end."""
    made = [tempfile.mkdtemp(prefix="bench_checkpoint_", dir=where)] if world.main else []
    (folder,) = gather_texts(made)
    try:
        yield Path(folder)
    finally:
        if world.main:
            shutil.rmtree(folder, ignore_errors=True)


def _sides(
    store: CheckpointStore,
    tensors: dict[str, Tensor],
    files: list[Path],
    folder: Path,
    world: World,
    device: torch.device,
) -> list[Side]:
    size, path = store.staged_bytes, files[0].parent
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    zeros = folder / f"zeros_{world.rank}"
    dd = ["dd", "if=/dev/zero", f"of={zeros}", f"count={size}", "iflag=count_bytes", "bs=1M", "conv=fsync"]
    step = 1

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    def begin() -> None:
        nonlocal step
        step += 1
        store.begin(step, tensors, {})

    def write() -> None:
        begin()
        store.settle()

    def forget() -> None:
        saved = store.settle() or store.latest()
        if world.main and saved is not None:
            delete(saved)
        dist.barrier()

    def bare_write() -> None:
        subprocess.run(dd, check=True, capture_output=True)
        dist.barrier()  # as a save, it is done when the slowest is

    def bare_read() -> None:
        _read(files)
        dist.barrier()

    return [
        Side(COPY, copy, no_reset),
        Side(BLOCKING, begin, forget),
        Side(WRITE, write, forget),
        Side(DD, bare_write, zeros.unlink),
        Side(READ, bare_read, no_reset),
        Side(LOAD, lambda: store.load(path, tensors), no_reset),
    ]


def _cool(files: list[Path]) -> None:
    """Have the kernel forget what it holds of these files, and wait for the other ranks."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def _read(files: list[Path]) -> None:
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _outcome(timings: Timings, first: float, sizes: Sizes, settings: CheckpointSettings, world: World) -> Outcome:
    told: dict[str, tuple[str, int]] = {
        BLOCKING: ("training waits", sizes.written),
        WRITE: ("until it is complete", sizes.written),
        LOAD: ("load and verify", sizes.read),
    }
    cells = [
        [
            words,
            mebibytes(size),
            milliseconds(timings.spread(ours)),
            BESIDE[ours],
            milliseconds(timings.spread(BESIDE[ours])),
            ratio(timings.ratio(BESIDE[ours], ours)),
        ]
        for ours, (words, size) in told.items()
    ]
    return Outcome(
        title=f"checkpoints of {world.size} {'rank' if world.size == 1 else 'ranks'} in {settings.folder}",
        columns=["", "MiB a rank", "ms", "beside", "ms", "its time / ours"],
        cells=cells,
        notes=[
            f"rank 0's median (quartiles) of {settings.rounds} interleaved rounds; the first save held training up for {1e3 * first:,.1f} ms",
            "copy: the same bytes into warm host memory; dd: zeros by as many writers, with fsync; cold read: the files that the rank needs",
            f"host memory for saves: {mebibytes(sizes.written)} MiB a rank, taken at the start",
        ],
        rows=[_json(timings, first, sizes, world)],
    )


def _json(timings: Timings, first: float, sizes: Sizes, world: World) -> dict[str, object]:
    return {
        "ranks": world.size,
        "written_bytes": sizes.written,
        "read_bytes": sizes.read,
        "first_blocking_seconds": first,
        "seconds": {name: timings.spread(name)._asdict() for name in timings.seconds},
        "ratios": {ours: timings.ratio(beside, ours)._asdict() for ours, beside in BESIDE.items()},
        "seconds_of_rounds": timings.seconds,
    }
