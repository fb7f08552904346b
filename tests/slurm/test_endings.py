"""What launch/slurm.sbatch makes of each way in which its step may end, on a real SLURM; the step is a program that ends as it is told."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.submit import Desk

SOFTMOE = """
echo start "$SLURM_RESTART_COUNT" with "$OMP_NUM_THREADS" threads, "$SLURM_CPUS_PER_TASK" cores
shift; for word; do echo "word: $word"; done
[ -z "$CODE_AFTER_SIGTERM" ] || trap 'exit $CODE_AFTER_SIGTERM' TERM
[ -z "$WAITS" ] || [ -n "$SLURM_RESTART_COUNT" ] || { sleep 60 & wait; }
exit "$CODE"
"""
ONE = ["--nodes=1", "launch/slurm.sbatch"]


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("endings"), cluster, SOFTMOE)


def started(desk: Desk, job: str) -> None:
    """Until its program runs."""
    desk.until(lambda: (desk.folder / f"softmoe_{job}.out").is_file() and "start" in desk.said(job), job)


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (1, "FAILED"), (2, "FAILED"), (3, "FAILED")])
def test_a_run_that_has_ended_for_good_is_not_requeued(desk: Desk, code: int, state: str) -> None:
    known = desk.cluster.wait_for(desk.sbatch(*ONE, CODE=str(code)), "COMPLETED", "FAILED")
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == (state, f"{code}:0", "0")


def test_a_hang_is_requeued_as_often_as_was_asked(desk: Desk) -> None:
    job = desk.sbatch(*ONE, CODE="4", SOFTMOE_HANGS="2")
    for times in (1, 2):
        desk.started_again(job, times)
    known = desk.cluster.wait_for(job, "FAILED")
    assert (known["ExitCode"], known["Restarts"], known["Comment"]) == ("4:0", "2", "softmoe_hangs=2")
    assert "hang number 3 is one more than SOFTMOE_HANGS=2: not requeued" in desk.said(job)


def test_a_cancelled_job_that_has_saved_is_not_requeued(desk: Desk) -> None:
    job = desk.sbatch(*ONE, WAITS="1", CODE_AFTER_SIGTERM="75")
    started(desk, job)
    desk.cluster.ask("scancel", job)
    desk.until(lambda: not desk.cluster.processes(job), job)
    assert desk.cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeued" not in desk.said(job)


def test_a_job_that_is_preempted_before_its_first_step_is_requeued_and_one_that_fails_later_is_not(desk: Desk) -> None:
    job = desk.sbatch("--cpus-per-task=4", "--nodelist=n1", *ONE, WAITS="1", CODE="1")
    started(desk, job)
    taker = ["--partition=high", "--nodelist=n1", "--cpus-per-task=4", "--output=/dev/null", "--wrap=:"]
    desk.cluster.ask("sbatch", *taker)
    desk.started_again(job, 1)
    assert "slurm.sbatch: preempted before its first step: requeued" in desk.said(job)
    known = desk.cluster.wait_for(job, "FAILED")
    assert (known["ExitCode"], known["Restarts"]) == ("1:0", "1")


def test_words_options_and_the_environment_reach_the_ranks_as_they_were_given(desk: Desk) -> None:
    words = ["data.train=/a b/*.tar", "seed=${oc.env:X}", "evals=[upstream, fewshot]"]
    job = desk.cluster.run(
        "sbatch", "--parsable", "--export=SOFTMOE_ENV=environment.sh", "--job-name=mine", "--output=%x.txt", "--cpus-per-task=2",
        "--nodes=2", "launch/slurm.sbatch", *words, folder=desk.folder,
    ).stdout.strip()  # fmt: skip
    desk.cluster.wait_for(job, "COMPLETED", "FAILED")
    said = sorted((desk.folder / "mine.txt").read_text().splitlines())
    for rank in range(2):
        assert f"{rank}: start  with 1 threads, 2 cores" in said
        assert [line for line in said if line.startswith(f"{rank}: word")] == sorted(
            f"{rank}: word: {w}" for w in words
        )


def test_without_its_environment_a_job_says_how_to_enter_one(desk: Desk, tmp_path: Path) -> None:
    job = desk.sbatch(*ONE, SOFTMOE_ENV="", PATH="/usr/bin:/bin")
    assert desk.cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert "activate its environment before sbatch, or have SOFTMOE_ENV name a file that does" in desk.said(job)
