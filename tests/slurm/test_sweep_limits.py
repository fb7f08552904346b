"""Points of a sweep on SLURM that meet a real time limit, or are preempted: they save, come back and reach their end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.runs import environment, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.program import PACE

STEPS, EVERY = 300, 10
POINTS = ("slots_per_expert=1", "slots_per_expert=2")
COMMAND = [
    sys.executable, "-m", "softmoe_train", "train", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2",
    "hydra.launcher.partition=low", "recipe=debug", "parallel.expert_axis=2", "model.moe.slots_per_expert=1,2", f"steps={STEPS}",
    "checkpoint.every=50", "checkpoint.grace=20", f"observe.every={EVERY}", "observe.wandb.mode=disabled", "sweep.cost=false",
    "run_dir=runs/sweep",
]  # fmt: skip
# Steps of the runs that jobs start are as slow as the file PACE says.
SLOW = """
import sys
if sys.orig_argv[1:3] == ["-m", "softmoe_train"] and "-m" not in sys.orig_argv[3:]:
    from softmoe_train import loop
    from tests.slurm.program import paced
    loop.train_step = paced
"""
PATIENCE = 900.0
pytestmark = pytest.mark.full


class Sweep:
    """The command of a sweep, waiting for its jobs."""

    def __init__(self, home: Path, cluster: Cluster, *words: str) -> None:
        self.home, self.cluster = home, cluster
        self.pace, self.log = home / "pace", home / "sweep.log"
        self.pace.write_text("2")
        (home / "slow").mkdir()
        (home / "slow" / "sitecustomize.py").write_text(SLOW)
        plain = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
        environ = cluster.environ | plain | {PACE: str(self.pace)}
        environ["PYTHONPATH"] = f"{home / 'slow'}:{environ['PYTHONPATH']}"
        with self.log.open("w") as out:
            self.process = subprocess.Popen([*COMMAND, *words], cwd=home, env=environ, stdout=out, stderr=out)

    def folder(self, point: str) -> Path:
        return self.home / "runs/sweep" / point

    def output(self, point: str) -> str:
        file = self.folder(point) / "output.log"
        return file.read_text() if file.is_file() else ""

    def reports(self, point: str) -> dict[int, float]:
        return metrics(self.folder(point), "train/loss") if (self.folder(point) / "metrics.jsonl").is_file() else {}

    def job(self, point: str) -> str:
        lines = map(json.loads, (self.home / "runs/sweep/ledger.jsonl").read_text().splitlines())
        return [one["job"] for one in lines if one["event"] == "started" and one["label"] == point][-1]

    def until(self, happened: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)

    def release(self) -> None:
        """Have jobs that were requeued start now: SLURM would let two minutes pass."""
        for point in POINTS:
            self.cluster.run("scontrol", "update", f"JobId={self.job(point)}", "StartTime=now")

    def finish(self) -> None:
        """Wait for its end, and see that both points are whole: each report once."""
        self.pace.write_text("0")

        def over() -> bool:
            self.release()
            return self.process.poll() is not None

        until = time.monotonic() + PATIENCE
        while not over():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(1.0)
        assert self.process.returncode == 0, self.log.read_text() + self.output(POINTS[0])
        for point in POINTS:
            lines = map(json.loads, (self.folder(point) / "metrics.jsonl").read_text().splitlines())
            steps = [line["step"] for line in lines if "train/loss" in line]
            assert len(set(steps)) == len(steps) and set(range(EVERY, STEPS + 1, EVERY)) <= set(steps)


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path):
    if find_spec("submitit") is None or find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra-submitit-launcher is not installed")
    started: list[Sweep] = []

    def begin(*words: str) -> Sweep:
        started.append(Sweep(tmp_path, cluster, *words))
        return started[-1]

    yield begin
    for sweep in started:
        if sweep.process.poll() is None:
            sweep.process.kill()
            sweep.process.wait()
            for point in POINTS:
                cluster.run("scancel", sweep.job(point))


# SLURM's signal comes 60 to 120 s before this, and is for the training, not for its imports.
LIMIT = [f"hydra.launcher.timeout_min={3 + int(os.getloadavg()[0] / 5)}", "hydra.launcher.signal_delay_s=60"]


def test_a_point_whose_time_is_up_saves_and_is_submitted_again_until_it_is_complete(start) -> None:
    sweep = start(*LIMIT)
    sweep.until(lambda: sweep.log.read_text().count("it is submitted again") >= 2)
    sweep.finish()
    for point in POINTS:
        said = sweep.output(point)
        assert "interrupted by SIGUSR1" in said and f"resumed from runs/sweep/{point}/checkpoints/" in said
        assert sweep.cluster.job(sweep.job(point))["Restarts"] == "0"


def test_with_max_num_timeout_the_job_itself_is_requeued(start) -> None:
    sweep = start(*LIMIT, "hydra.launcher.max_num_timeout=5")
    sweep.until(lambda: all("interrupted by SIGUSR1" in sweep.output(point) for point in POINTS))
    sweep.finish()
    assert "it is submitted again" not in sweep.log.read_text()
    for point in POINTS:
        assert f"resumed from runs/sweep/{point}/checkpoints/" in sweep.output(point)
        assert int(sweep.cluster.job(sweep.job(point))["Restarts"]) >= 1


def test_a_preempted_point_saves_and_goes_on(start) -> None:
    sweep = start("hydra.launcher.timeout_min=20", "hydra.launcher.signal_delay_s=60")
    sweep.until(lambda: all(len(sweep.reports(point)) >= 3 for point in POINTS))
    taker = sweep.cluster.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--cpus-per-task=3", "--output=/dev/null", "--wrap=:"
    )
    sweep.until(lambda: sweep.release() or sweep.cluster.job(taker)["JobState"] == "COMPLETED")
    sweep.finish()
    for point in POINTS:  # each saved in time, so its job had ended before SLURM could requeue it
        assert f"{point}: asked to end at step " in sweep.log.read_text()
        assert "interrupted by SIGTERM" in sweep.output(point) and "resumed from" in sweep.output(point)
