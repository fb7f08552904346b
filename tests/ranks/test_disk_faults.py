"""A run of two ranks whose disk fills, turns read-only and loses its folder: it goes on, and its numbers are those of a good disk."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError, verify
from softmoe_train.checkpoint.folder import step_folders
from softmoe_train.config import compose
from softmoe_train.data.batch import Batch
from softmoe_train.dist import World
from softmoe_train.engine.torch_engine import TorchEngine
from softmoe_train.run import train
from softmoe_train.settings import RunConfig
from tests.disks import fill, forbid, permit, small_disk
from tests.ports import free_ports
from tests.ranks.launch import run_ranks
from tests.runs import metrics, same_bits, stored

STEPS = 16
RUN = [
    "recipe=debug", f"steps={STEPS}", "observe.every=1", "observe.progress=plain", "observe.wandb.mode=disabled",
    "checkpoint.every=2", "checkpoint.keep_last=1", "evals.upstream.every=0",
]  # fmt: skip
FORWARD = TorchEngine.forward_backward
OTHERS = "of_others"


def fill_up(disk: Path) -> None:
    fill(disk / OTHERS)


def make_room(disk: Path) -> None:
    (disk / OTHERS).unlink()


def delete_run(disk: Path) -> None:
    shutil.rmtree(disk / "run")


Events = dict[int, Callable[[Path], object]]  # what happens to the disk while a step computes
BAD_DAYS: Events = {3: fill_up, 5: make_room, 7: forbid, 9: permit, 11: delete_run}


def trained(rank: int, world: int, disk: str, events: Events, port: int) -> tuple[str, list[str], str]:
    """Why the run in `disk` ended, the checkpoints that are there then, and what it printed."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    step = 0

    def forward_backward(self: TorchEngine, batch: Batch, *, last: bool) -> Tensor:
        nonlocal step
        step += 1
        if rank == 0 and step in events:
            for thread in threading.enumerate():  # the save before it has ended, well or not
                if thread.name == "checkpoint":
                    thread.join()
            events[step](Path(disk))
        return FORWARD(self, batch, last=last)

    TorchEngine.forward_backward = forward_backward
    config = compose(RunConfig, [*RUN, f"run_dir={disk}/run"], lambda _: [])
    with redirect_stdout(StringIO()) as printed:
        try:
            reason = train(config, World(rank, world, rank, world))
        except CheckpointError as error:
            reason = str(error)
    dist.destroy_process_group() if dist.is_initialized() else None
    dist.init_process_group("gloo", store=dist.FileStore(f"{disk}_{port}", world), rank=rank, world_size=world)
    left = [path.name for path in step_folders(Path(disk, "run", "checkpoints"), complete=True)]
    return reason, left, printed.getvalue()


def run(disk: Path, events: Events) -> tuple[str, list[str], str]:
    one, two = run_ranks(trained, 2, str(disk), events, free_ports(1)[0])
    assert one[:2] == two[:2]
    return one


def same_end(one: Path, two: Path, since: int) -> bool:
    def late(run: Path, name: str) -> dict[int, float]:
        return {step: value for step, value in metrics(run, name).items() if step >= since}

    same: list[Any] = [late(one, name) == late(two, name) for name in ("train/loss", "train/grad_norm")]
    return all(same) and same_bits(stored(one, STEPS), stored(two, STEPS))


def test_a_run_goes_on_while_its_disk_fails_and_stops_before_it_could_not_save_at_all(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    assert run(good, {})[0] == "complete"
    with small_disk(tmp_path / "disk", 6) as disk:
        reason, left, said = run(disk, BAD_DAYS)
        assert (reason, left) == ("complete", ["step_00000016"])
        assert same_end(disk / "run", good / "run", since=12)
        assert "step_00000004 was not saved:\n  - the disk of " in said
        assert "step_00000008 was not saved:\n  - rank 0: OSError: [Errno 30] Read-only file system" in said
        assert said.count("the run goes on; the last checkpoint is step_00000002") == 1
        assert said.count("the run goes on; the last checkpoint is step_00000006") == 1
        assert "the run folder was deleted or replaced: from step 11 on it is written anew" in said
        assert json.loads((disk / "run" / "summary.json").read_text())["ended"] == "complete"
        assert sorted(metrics(disk / "run", "train/loss")) == list(range(11, STEPS + 1))

    with small_disk(tmp_path / "full", 6) as disk:
        reason, left, _ = run(disk, {5: fill_up})
        assert "step_00000010 was not saved:\n  - the disk of " in reason
        assert "that makes 3 saves in a row (checkpoint.max_failures); the last checkpoint is step_00000004" in reason
        assert left == ["step_00000004"]
        assert verify(disk / "run" / "checkpoints" / left[-1]) == []
        make_room(disk)
        assert run(disk, {})[0] == "complete"
        assert same_end(disk / "run", good / "run", since=1)
