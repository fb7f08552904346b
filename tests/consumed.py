"""This file owns the record of what a run consumes: `python -m tests.consumed train [overrides]` is `softmoe train`, and writes it down.

Each rank appends a line for each step that it took to a file in the folder CONSUMED of the environment; a run of one process is rank 0. On a disk that is as slow as
SLOW_DISK says, in seconds for the tensors of a save, where that is set.
"""

import hashlib
import json
import os
import sys
import time
from functools import cache

from softmoe_train import loop
from softmoe_train.commands import workers
from softmoe_train.commands.main import main
from softmoe_train.data.batch import Batch
from softmoe_train.engine.protocol import Engine
from softmoe_train.loop import StepReport

CONSUMED = "SOFTMOE_TEST_CONSUMED"
SLOW_DISK = "SOFTMOE_TEST_SLOW_DISK"
FSYNC = os.fsync
TRAIN_STEP = loop.train_step
LAUNCH_LOCAL = workers.launch_local


def name_of(pixels: bytes) -> str:
    """What stands for a picture (3 x H x W bytes) in the record."""
    return hashlib.sha1(pixels).hexdigest()[:16]


def recorded(engine: Engine, batch: Batch, lr: float, micro_batches: int, *, moves: bool = False) -> StepReport:
    """One step, then a line with the position after it and the pictures that it was given, as one write: a kill leaves all or nothing."""
    report = TRAIN_STEP(engine, batch, lr, micro_batches, moves=moves)
    pictures = [name_of(image.numpy().tobytes()) for image in batch.images]
    line = {"position": batch.cursor.position, "samples": batch.sample_ids.tolist(), "pictures": pictures}
    os.write(record(), json.dumps(line).encode() + b"\n")
    return report


@cache
def record() -> int:
    """The file of this rank."""
    path = os.path.join(os.environ[CONSUMED], f"rank_{os.environ.get('RANK', '0')}.jsonl")
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def flushed(file: int) -> None:
    """A flush of a disk that is slow with tensors."""
    if os.readlink(f"/proc/self/fd/{file}").endswith(".safetensors"):
        time.sleep(float(os.environ[SLOW_DISK]))
    FSYNC(file)


def launched(processes: int, command: list[str], *, grace_seconds: int, told: tuple[int, ...]) -> int:
    """The real launcher, whose workers are this program too."""
    ours = [__spec__.name if word == "softmoe_train" else word for word in command]
    return LAUNCH_LOCAL(processes, ours, grace_seconds=grace_seconds, told=told)


if __name__ == "__main__":
    if TRAIN_STEP.__module__ == loop.__name__:  # else this is a fork of a launcher, which has done it
        loop.train_step = recorded
        os.fsync = flushed
        workers.launch_local = launched
    sys.exit(main(sys.argv[1:]))
