"""This file owns how tests submit launch/slurm.sbatch, follow its run, and have a requeued job start at once."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.program import FAILS, PACE

PROGRAM = f'exec {sys.executable} -m tests.slurm.program "$@"'
PATIENCE_SECONDS = 180.0


class Desk:
    """A folder from which jobs are submitted, as a user's checkout: it has launch/ and a file that enters the environment; `softmoe` is a
    script of sh."""

    def __init__(self, folder: Path, cluster: Cluster, softmoe: str = PROGRAM) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "launch").symlink_to(ROOT / "launch")
        program = folder / "bin" / "softmoe"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{softmoe}\n")
        program.chmod(0o755)
        (folder / "environment.sh").write_text(
            f"export PATH={folder}/bin:$PATH PYTHONPATH={ROOT}:${{PYTHONPATH:-}} WANDB_MODE=disabled OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}\n"
        )

    def sbatch(self, *words: str, pace: str = "pace", **changes: str) -> str:
        """Submit, and return the number of the job; its steps are as slow as the file `pace` says at the time."""
        changes = {"SOFTMOE_ENV": "environment.sh", **self.paced(pace), **changes}
        done = self.cluster.run("sbatch", "--parsable", *words, folder=self.folder, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def paced(self, pace: str = "pace") -> dict[str, str]:
        """The environment of steps that are as slow as this file says."""
        (self.folder / pace).touch()
        return {PACE: str(self.folder / pace)}

    def said(self, job: str) -> str:
        """The file that a user opens first, which every start of the job adds to."""
        return (self.folder / f"softmoe_{job}.out").read_text()

    def step(self, run: str) -> int:
        """The last step that a run has reported."""
        file = self.folder / run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def started_again(self, job: str, times: int) -> None:
        """Have a job that is being requeued for the n-th time start now: SLURM would let two minutes pass."""

        def waits() -> bool:
            known = self.cluster.job(job)
            return (known["JobState"], known["Restarts"]) == ("PENDING", str(times))

        def is_let() -> bool:
            self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return not waits()

        self.until(waits, job)
        self.until(is_let, job)

    def until(self, happened: Callable[[], object], job: str) -> None:
        """Wait until something has happened."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert time.monotonic() < until, f"{self.cluster.job(job)}\n{self.said(job)}"
            time.sleep(0.1)


def failing(rank: int) -> dict[str, str]:
    """The environment in which this rank fails."""
    return {FAILS: str(rank)}
