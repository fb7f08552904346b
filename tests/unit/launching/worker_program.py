"""A small worker for the launching tests: `python -m tests.unit.launching.worker_program MODE FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from softmoe_train.launching.worker import RESUME, run_worker


def main() -> int:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if mode in ("stubborn", "raise-and-hang"):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    elif mode == "save":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: save(folder, rank, number))
    note(folder, f"rank{rank}")
    if mode == "sum":
        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        (folder / f"sum{rank}").write_text(f"{total.item()} of {world}")
        dist.destroy_process_group()
    elif mode == "raise":
        dist.init_process_group("gloo")
        if rank == 1:
            raise RuntimeError("expert 7 is on fire")
        dist.all_reduce(torch.zeros(1))  # fails when rank 1 has gone
    elif mode == "raise-and-hang":
        if rank == 1:
            while not (folder / "rank0.pid").exists():
                time.sleep(0.05)
            raise RuntimeError("expert 7 is on fire")
        time.sleep(120)
    elif mode == "killed":
        dist.init_process_group("gloo")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(1))
    elif mode == "code":
        return 7 if rank == 1 else 0
    elif mode == "resume":
        if rank == 0:
            time.sleep(1)
            (folder / "closed").touch()
        return RESUME
    elif mode in ("sleep", "stubborn", "save"):
        time.sleep(120)
    elif mode == "decode":
        for _ in DataLoader(Endless(folder, rank), num_workers=1, batch_size=None):
            time.sleep(0.05)
    return 0


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def __iter__(self):
        note(self.folder, f"decode{self.rank}")
        while True:
            yield torch.zeros(1)


def save(folder: Path, rank: int, number: int) -> None:
    with (folder / f"told{rank}").open("a") as told:
        told.write(f"{signal.Signals(number).name} ")
    time.sleep(1)
    (folder / f"saved{rank}").touch()
    sys.exit(RESUME)


def note(folder: Path, name: str) -> None:
    part = folder / f"{name}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{name}.pid")


if __name__ == "__main__":
    sys.exit(run_worker(main))
