"""This file owns what a rank knows of itself before a run: host, device, versions, room, environment and clock."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.cuda import nccl

import softmoe_train
from softmoe_train.config import Record
from softmoe_train.cores import cores_of_host, usable_cores
from softmoe_train.dist import World
from softmoe_train.observe.code_version import code_version

# Whose version decides numbers, or what goes over the wire or onto the disk.
PACKAGES = ("deepspeed", "numpy", "pillow", "safetensors", "simplejpeg", "torch", "webdataset", "xxhash")
SETS_BEHAVIOUR = ("CUDA_", "FI_", "GLOO_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_", "UCX_")
CLOCK_ROUNDS = 8


class Clock(Record):
    """How far a rank's clock is ahead of rank 0's, in seconds: between these two, by what cannot have been otherwise."""

    least: float
    most: float

    @property
    def off(self) -> float:
        """The offset that is certain; 0 where it may be none."""
        return max(self.least, 0.0) + min(self.most, 0.0)


class RankFacts(Record):
    """One rank, as it sees itself. `versions` must be those of every rank; `others` need not."""

    rank: int
    host: str
    device: str
    device_id: str | None  # of the hardware; None on a CPU
    settings: str  # a hash of all of them
    versions: dict[str, str]
    others: dict[str, str]
    environment: dict[str, str]  # what sets the behaviour of the libraries below us
    free_bytes: dict[str, int]  # device, run folder, shared memory
    cores: tuple[int, int]  # that this process may use, that its host or container has
    threads: int
    files: int  # that it may have open
    clock: tuple[float, ...]  # of each round, when it began and when it ended


def facts_of_rank(world: World, device: torch.device, folder: Path, settings: str) -> RankFacts:
    """What this rank is, `settings` a hash of what it was told. Collective: clocks are read between agreements."""
    name, identity = _hardware(device)
    versions, others = _versions(device)
    return RankFacts(
        rank=world.rank,
        host=socket.gethostname(),
        device=name,
        device_id=identity,
        settings=settings,
        versions=versions,
        others=others,
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(SETS_BEHAVIOUR)},
        free_bytes=_room(device, folder),
        cores=(usable_cores(), cores_of_host()),
        threads=torch.get_num_threads(),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock=_read_clock(),
    )


def clock_of(facts: RankFacts, first: RankFacts) -> Clock:
    """How far its clock is ahead of that of `first`.

    No rank leaves a round before every rank has entered it, so some instant lies in the round of both: it bounds the offset, and the
    bounds of all rounds hold. No round trip is halved, and any number of ranks is read at once.
    """
    theirs, ours = _rounds(facts.clock), _rounds(first.clock)
    least = max(begin - end0 for (begin, _), (_, end0) in zip(theirs, ours, strict=True))
    most = min(end - begin0 for (_, end), (begin0, _) in zip(theirs, ours, strict=True))
    return Clock(least=least, most=max(least, most))  # a clock that was set meanwhile contradicts itself


def _rounds(readings: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(readings[::2], readings[1::2], strict=True))


def _read_clock() -> tuple[float, ...]:
    readings = []
    for _ in range(CLOCK_ROUNDS):
        readings.append(time.time())
        dist.all_reduce(torch.zeros(1))  # on the CPU: a sum is there when all have given their part
        readings.append(time.time())
    return tuple(readings)


def _hardware(device: torch.device) -> tuple[str, str | None]:
    """What the device calls itself, and which one it is."""
    if device.type != "cuda":
        return platform.machine(), None
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(getattr(properties, "uuid", "")) or None


def _versions(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """What must be the same everywhere, and what is told where it is not."""
    code = code_version()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with its build, which metadata may lack
    versions["python"] = ".".join(platform.python_version_tuple()[:2])
    versions["softmoe_train"] = f"{code['version']}, code {_code_hash()}"
    others = {"python": platform.python_version(), "commit": code["commit"] or "", "kernel": platform.release()}
    if device.type == "cuda":
        versions |= {
            "CUDA": str(torch.version.cuda or torch.version.hip),
            "NCCL": ".".join(map(str, nccl.version())),
        }
        others["driver"] = _driver()
    return versions, others


def _code_hash() -> str:
    """A hash of every source file of this package: two hosts may have one version, and not one code."""
    root = Path(softmoe_train.__file__).parent
    code = xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return code.hexdigest()


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("Kernel Module")[2].split("  ")[1].strip()
    except (OSError, IndexError):
        return ""


def _room(device: torch.device, folder: Path) -> dict[str, int]:
    """Free bytes of the device, of the disk of the run folder and of shared memory, where there are such."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    places: dict[str, Any] = {"run folder": folder, "/dev/shm": Path("/dev/shm")}
    free = {name: shutil.disk_usage(path).free for name, path in places.items() if path.exists()}
    if device.type == "cuda":
        free["device"] = torch.cuda.mem_get_info(device)[0]
    return free
