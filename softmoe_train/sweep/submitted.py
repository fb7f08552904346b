"""This file owns what a job of a sweep does on each of its tasks: `softmoe` in a process of its own under srun's variables, and a note of its end.

submitit pickles it by name and imports it on every task, so it imports nothing but the standard library.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

RESUME = 75  # as in launching/worker.py, which imports torch
OUTPUT = "output.log"  # of rank 0, in the folder of the point; of rank 3 it is output.3.log


@dataclass(frozen=True)
class SubmittedPoint:
    """One point. Called by submitit on each task; ends the task with the exit code of the run."""

    words: tuple[str, ...]  # verb and overrides
    folder: str  # of the run
    notes: str  # the folder for notes of how tasks ended
    requeues: int  # how often the job has SLURM start it again after its time limit

    def __call__(self) -> int:
        """Run, pass on what asks to end, note how it ended. What SLURM sends reaches the run too: two signals in a moment are one there."""
        rank, asked, runs = int(os.environ.get("SLURM_PROCID", "0")), [], []

        def hear(number: int, frame: object) -> None:
            number = signal.SIGUSR1 if number == signal.SIGUSR2 else number
            asked.append(signal.Signals(number).name)
            for process in runs:
                process.send_signal(number)

        # In the place of submitit's, which would requeue before the run has saved; its own signal stands for ours.
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, hear)
        code = self._run(rank, runs, asked)
        code = code if code >= 0 else 128 - code
        again = code == RESUME and rank == 0 and asked[:1] == ["SIGUSR1"] and _restarts() < self.requeues
        note = {"rank": rank, "code": code, "asked": asked[:1], "time": time.time(), "requeued": again}
        self._note(note)
        if again and subprocess.run(["scontrol", "requeue", _job()], check=False).returncode:
            self._note({**note, "requeued": False})  # SLURM does not, so this is the end
        if code:
            sys.stdout.flush()
            os._exit(code)  # an exception would be pickled, and hide the code
        return code

    def _note(self, note: dict[str, object]) -> None:
        path = Path(self.notes) / f"{_job()}_{_restarts()}_{note['rank']}.json"
        path.with_suffix(".part").write_text(json.dumps(note))
        path.with_suffix(".part").replace(path)

    def _run(self, rank: int, runs: list[subprocess.Popen[bytes]], asked: list[str]) -> int:
        log = Path(self.folder) / (OUTPUT if rank == 0 else f"output.{rank}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))}
        with log.open("ab") as out:
            line = f"\n{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, job {_job()}: softmoe {shlex.join(self.words)}\n"
            out.write(line.encode())
            out.flush()
            # SLURM signals every process of a task, and a run that does not know this one would die of it.
            before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            process = subprocess.Popen(
                [sys.executable, "-m", "softmoe_train", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **threads},
            )
        signal.signal(signal.SIGUSR2, before)
        runs.append(process)
        for name in asked[:1]:  # before it was there to hear
            process.send_signal(signal.Signals[name])
        return process.wait()


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "0")


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
