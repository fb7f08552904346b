"""This file owns one start of a real run that a test ends by force: its processes, what it takes, and what it has half written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from softmoe_train.checkpoint.folder import step_folders, step_of
from tests.consumed import CONSUMED, SLOW_DISK
from tests.runs import alive, command, environment
from tests.under_way import UnderWay

BATCH = 32
EVERY = 3  # steps between saves
# Many narrow experts: a step takes as long as a save's write, 25 MB in all.
RUN = [
    "recipe=quickstart", "processes=2", "parallel.expert_axis=2", f"batch_size={BATCH}", "schedule.warmup_steps=5", "observe.every=1",
    f"checkpoint.every={EVERY}", "evals.upstream.every=0", "model.width=64", "model.depth=2", "model.mlp_dim=256",
    "model.moe.blocks=last 1", "model.moe.num_experts=64", "model.moe.slots_per_expert=1",
]  # fmt: skip
PATIENCE_SECONDS = 300.0
ORPHAN_SECONDS = 60.0  # a rank that still imports hears of its launcher's death when that is done


class Life:
    """One start of the run in `folder`, from the launcher's start to the end of its last process; anew, or `forked` from a process with the imports."""

    def __init__(
        self, folder: Path, name: str, steps: int, *more: str, slow_disk: float = 0.0, forked: bool = False
    ) -> None:
        self.run, records = folder / name, folder / f"{name}_consumed"
        self.record = records / f"life_{len(list(records.glob('life_*'))):04d}"
        self.record.mkdir(parents=True)
        self.began, self.began_ns = time.monotonic(), time.time_ns()
        overrides = [*RUN, f"steps={steps}", f"run_dir={name}", *more]
        record = {CONSUMED: str(self.record), SLOW_DISK: str(slow_disk)}
        program = "tests.consumed"
        if forked:
            words = command(*overrides)[3:]
            self.launcher = UnderWay(*words, folder=folder, module=program, modules=(program,), **record)
            self.printed = [self.launcher.stdout, self.launcher.stderr]
            return
        self.printed = [folder / f"{name}.txt"]
        with self.printed[0].open("w") as printed:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", program, *command(*overrides)[3:]], cwd=folder, env=environment(**record),
                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def taken(self) -> list[int]:
        """The steps that rank 0 took in this life."""
        file = self.record / "rank_0.jsonl"
        if not file.is_file():
            return []
        with file.open("rb") as lines:
            return [json.loads(line)["position"] // BATCH for line in lines]

    def until(self, happened: Callable[[], object], look_seconds: float) -> None:
        """Wait until something has happened or the launcher has ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.launcher.poll() is None and not happened():
            assert time.monotonic() < until, self.said()
            time.sleep(look_seconds)

    def processes(self) -> dict[str, int]:
        """Those of this life by name: the launcher, and the ranks that it has started."""
        launcher, found = self.launcher.pid, {"launcher": self.launcher.pid}
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        if isinstance(self.launcher, UnderWay):  # a fork shows its server's environment; children come in their order
            return found | {f"rank {rank}": int(pid) for rank, pid in enumerate(children)}
        for pid in children:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {f"rank {word[5:].decode()}": int(pid) for word in words if word.startswith(b"RANK=")}
        return found

    def unfinished(self) -> dict[str, int]:
        """Bytes by file of what this life has written of tensors into step folders without a mark, newer than those with one."""
        checkpoints, found = self.run / "checkpoints", {}
        complete = step_folders(checkpoints, complete=True)
        for path in step_folders(checkpoints, complete=False):
            if complete and step_of(path) < step_of(complete[-1]):
                continue  # it is being deleted
            for file in path.glob("*.safetensors"):
                try:
                    facts = file.stat()
                except FileNotFoundError:
                    continue
                if facts.st_size and facts.st_mtime_ns > self.began_ns:
                    found[f"{path.name}/{file.name}"] = facts.st_size
        return found

    def send(self, number: signal.Signals, whom: str) -> dict[str, int]:
        """A signal to the launcher, to one rank (the launcher where it is not there yet) or to all; returns the processes there were."""
        there = self.processes()
        for name, pid in there.items():
            if whom in (name, "all") or (name == "launcher" and whom not in there):
                os.kill(pid, number)
        return there

    def end(self, processes: dict[str, int]) -> int:
        """Wait until every process of it has ended; the launcher's exit code."""
        code = self.launcher.wait(PATIENCE_SECONDS)
        until = time.monotonic() + ORPHAN_SECONDS
        while any(alive(pid) for pid in processes.values()):
            assert time.monotonic() < until, f"{processes} outlived their launcher"
            time.sleep(0.01)
        return code

    def complete(self) -> int:
        """The step of the newest complete checkpoint, 0 for none."""
        found = step_folders(self.run / "checkpoints", complete=True)
        return step_of(found[-1]) if found else 0

    def check_start(self, complete: int) -> None:
        """Refuse a life that took its first step from anywhere but the newest complete checkpoint, which was of step `complete`."""
        assert self.taken()[:1] in ([], [complete + 1]), (self.taken(), complete, self.said())

    def said(self) -> str:
        """What the launcher and its ranks have printed."""
        return "".join(file.read_text() for file in self.printed)
