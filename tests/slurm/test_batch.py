"""launch/slurm.sbatch on a real SLURM of two nodes: whatever SLURM does to a job, its run goes on as if nothing had happened."""

import os
import re
import shlex
import time
from pathlib import Path

import pytest

from softmoe_train.checkpoint import verify
from softmoe_train.checkpoint.folder import step_folders
from tests.runs import ROOT, metrics, same_bits, stored
from tests.slurm.cluster import Cluster
from tests.slurm.program import PLANTED
from tests.slurm.submit import Desk, failing

STEPS = 120
SLOWER, SLOW, FAST = "1.5", "0.3", "0"  # seconds more a step: what a test does to a job must come before its end


def documented() -> list[str]:
    """The words of the README's sbatch command."""
    section = (ROOT / "README.md").read_text().split("## On SLURM, with requeue")[1].split("\n## ")[0]
    (line,) = re.findall(r"^    sbatch (.*recipe=debug.*)$", section, flags=re.MULTILINE)
    return shlex.split(line)


COMMAND = [*documented(), f"steps={STEPS}", "observe.every=1"]
RUN = "runs/slurm"  # the run folder of that


def to(run: str) -> list[str]:
    """The same command into another run folder."""
    return [*COMMAND, f"run_dir={run}"]


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), cluster)


@pytest.fixture(scope="module", autouse=True)
def limited(desk: Desk) -> str:
    """A job near its time limit, in the partition that nobody preempts. SLURM looks every half minute, so it comes first."""
    minutes = 2 + int(
        os.getloadavg()[0] / 5
    )  # its signal, 60 to 90 s before that, is for the training, and not for its imports
    (desk.folder / "limited_pace").write_text(SLOWER)
    limit = ["--partition=high", f"--time={minutes}", "--signal=USR1@60"]
    return desk.sbatch(*limit, *to("runs/limited"), pace="limited_pace")


@pytest.fixture(scope="module")
def whole(desk: Desk) -> Path:
    """The run that nothing interrupts, by the README's command."""
    job = desk.sbatch(*COMMAND)
    known = desk.cluster.wait_for(job, "COMPLETED", "FAILED")
    assert known["JobState"] == "COMPLETED", desk.said(job)
    assert "2 processes, expert axis 2" in desk.said(job)
    return desk.folder / RUN


def same_runs(one: Path, two: Path) -> bool:
    measures = ("train/loss", "train/grad_norm", "upstream/test/loss")
    same = [metrics(one, measure) == metrics(two, measure) != {} for measure in measures]
    return all(same) and same_bits(stored(one, STEPS), stored(two, STEPS))


def test_sbatch_trains_on_two_nodes(whole: Path, desk: Desk) -> None:
    assert list(metrics(whole, "train/loss"))[-1] == STEPS


@pytest.fixture(scope="module")
def interrupted(desk: Desk) -> dict[str, str]:
    """What the job said of a run that was requeued, preempted and cancelled on its way, and submitted again; the run is complete."""
    run, cluster, said = "runs/interrupted", desk.cluster, {}
    pace = desk.folder / "pace_of_interrupted"
    pace.write_text(SLOW)
    job = desk.sbatch("--cpus-per-task=2", *to(run), pace=pace.name)

    desk.until(lambda: desk.step(run) >= 15, job)
    cluster.ask("scontrol", "requeue", job)
    desk.started_again(job, 1)

    desk.until(lambda: desk.step(run) >= 30, job)
    taker = cluster.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--cpus-per-task=3", "--output=/dev/null", "--wrap=:"
    )
    cluster.wait_for(taker, "COMPLETED")
    desk.started_again(job, 2)

    desk.until(lambda: desk.step(run) >= 45, job)
    cluster.ask("scancel", job)
    said["state when cancelled"] = cluster.wait_for(job, "CANCELLED")["JobState"]
    desk.until(lambda: not cluster.processes(job), job)
    said["job"] = desk.said(job)
    (newest, *_) = reversed(step_folders(desk.folder / run / "checkpoints", complete=True))
    said["damage when cancelled"] = str(verify(newest))

    pace.write_text(FAST)
    again = desk.sbatch(*to(run), pace=pace.name)
    assert cluster.wait_for(again, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", desk.said(again)
    said["again"] = desk.said(again)
    return said


def resumptions(said: str) -> list[int]:
    """The steps from which the starts of a job went on."""
    return [int(step) for step in re.findall(r"resumed from \S+ at step (\d+) of", said)]


def test_requeued_preempted_and_cancelled_it_is_the_uninterrupted_run_bit_for_bit(
    whole: Path, interrupted: dict[str, str], desk: Desk
) -> None:
    assert same_runs(whole, desk.folder / "runs/interrupted")


def test_every_start_goes_on_in_the_same_run_folder_and_output_file(interrupted: dict[str, str]) -> None:
    first, second = resumptions(interrupted["job"])
    (third,) = resumptions(interrupted["again"])
    assert 15 <= first < 30 <= second < 45 <= third < STEPS


def test_a_preempted_run_saves_within_the_grace_time_and_requeues_itself(interrupted: dict[str, str]) -> None:
    assert "slurm.sbatch: interrupted, and saved: requeued" in interrupted["job"]
    assert interrupted["job"].count("interrupted by SIGTERM: saving step") == 3


def test_a_cancelled_job_is_not_requeued_and_leaves_a_whole_checkpoint_and_no_process(
    interrupted: dict[str, str],
) -> None:
    assert interrupted["job"].count("requeued") == 1
    assert interrupted["damage when cancelled"] == "[]"


def test_a_rank_that_fails_ends_the_job_within_seconds_and_its_traceback_alone_is_in_the_log(desk: Desk) -> None:
    job = desk.sbatch(*to("runs/failing"), **failing(rank=1))
    desk.until(lambda: (desk.folder / f"softmoe_{job}.out").is_file() and PLANTED in desk.said(job), job)
    began = time.monotonic()
    known = desk.cluster.wait_for(job, "FAILED", "COMPLETED", "PENDING")
    assert time.monotonic() - began < 30
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0")
    assert known["ExitCode"] != "0:0"
    said = desk.said(job)
    assert re.findall(r"^\d: rank (\d) failed:$", said, flags=re.MULTILINE) == ["1"]
    assert said.count("Traceback (most recent call last)") == 1
    assert f"1: RuntimeError: {PLANTED}" in said


def test_before_its_time_limit_a_job_saves_and_requeues_itself_until_the_run_is_complete(
    desk: Desk, limited: str, whole: Path
) -> None:
    desk.until(lambda: "interrupted by SIGUSR1 at step" in desk.said(limited), limited)
    (desk.folder / "limited_pace").write_text(FAST)
    desk.started_again(limited, 1)
    known = desk.cluster.wait_for(limited, "COMPLETED", "FAILED")
    assert known["JobState"] == "COMPLETED" and known["Restarts"] >= "1", desk.said(limited)
    assert "slurm.sbatch: interrupted, and saved: requeued" in desk.said(limited)
    assert 0 < resumptions(desk.said(limited))[0] < STEPS
    assert same_runs(whole, desk.folder / "runs/limited")
