"""What launch/slurm.sbatch does at the end of its step, under stand-ins for srun and scontrol: it asks SLURM the right thing, and says so."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_train.launching.progress import NOTHING, SAVED
from tests.runs import ROOT

SRUN = 'printf %s "$TOLD" >"$SOFTMOE_PROGRESS"\nexit "$CODE"\n'
# It keeps the job's Comment in a file, and does not answer as often as the file `unanswered` says.
SCONTROL = """cd "$(dirname "$0")"
left=$(cat unanswered)
if [ "$left" -gt 0 ]; then echo $((left - 1)) >unanswered; echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; fi
echo "$*" >>asked
for word; do case $word in Comment=*) echo "${word#Comment=}" >comment ;; esac; done
echo "JobId=7 JobState=$STATE Comment=$(cat comment) End"
"""
Batch = Callable[..., str]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Runs the file once with these changes of the environment and srun's exit code; returns what it said."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "softmoe": "", "sleep": "echo sleep >>slept\n"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    for name, text in {"unanswered": "0", "comment": "(null)", "asked": "", "environment.sh": ""}.items():
        (tmp_path / name).write_text(text)

    def run(code: int, **changes: str) -> str:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
        environ = {
            **slurm,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CODE": str(code),
            "STATE": "RUNNING",
            **changes,
        }
        done = subprocess.run(
            ["bash", ROOT / "launch" / "slurm.sbatch"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=60
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr

    return run


def requeues(folder: Path) -> int:
    return (folder / "asked").read_text().splitlines().count("requeue 7")


def test_options_that_the_file_of_the_environment_sets_do_not_reach_the_requeue(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "environment.sh").write_text("set -e -f -o noclobber\n")
    assert "interrupted, and saved: requeued" in batch(75, SOFTMOE_ENV="environment.sh")
    assert requeues(tmp_path) == 1


def test_a_controller_that_does_not_answer_at_once_is_asked_again(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "unanswered").write_text("3")
    assert "interrupted, and saved: requeued" in batch(75)
    assert requeues(tmp_path) == 1 and len((tmp_path / "slept").read_text().split()) == 3


@pytest.mark.parametrize("code", [75, 4, 1])
def test_a_controller_that_never_answers_is_told_with_what_to_do(batch: Batch, tmp_path: Path, code: int) -> None:
    (tmp_path / "unanswered").write_text("99")
    said = batch(code, SOFTMOE_PATIENCE="0")
    assert "not requeued, for SLURM does not answer; sbatch the same command to go on" in said
    assert requeues(tmp_path) == 0


def test_a_job_that_slurm_is_ending_is_left_at_that_and_it_is_said(batch: Batch, tmp_path: Path) -> None:
    assert "interrupted, and saved; SLURM is ending the job (JobState=CANCELLED)" in batch(75, STATE="CANCELLED")
    assert requeues(tmp_path) == 0


def test_hangs_are_counted_beside_another_count_and_bounded(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "comment").write_text("softmoe_stuck=2")
    assert "hang number 1: requeued" in batch(4, SOFTMOE_HANGS="1")
    assert (tmp_path / "comment").read_text() == "softmoe_stuck=2 softmoe_hangs=1\n"
    assert "hang number 2 is one more than SOFTMOE_HANGS=1: not requeued" in batch(4, SOFTMOE_HANGS="1")
    assert requeues(tmp_path) == 1


def test_a_run_that_never_completes_a_checkpoint_is_not_requeued_for_ever(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "comment").write_text("softmoe_hangs=1")
    batch(75, TOLD=NOTHING)
    assert "no checkpoint was completed in 2 starts in a row; the third is the last: requeued" in batch(
        75, TOLD=NOTHING
    )
    assert (tmp_path / "comment").read_text() == "softmoe_hangs=1 softmoe_stuck=2\n"
    said = batch(75, TOLD=NOTHING)
    assert "no checkpoint was completed in 3 starts in a row: not requeued" in said
    assert all(remedy in said for remedy in ("checkpoint.grace=", "--signal=", "checkpoint.every"))
    assert requeues(tmp_path) == 2
    assert not list(tmp_path.glob(".softmoe*"))


@pytest.mark.parametrize("told", [SAVED, ""])
def test_a_run_that_gets_on_or_cannot_tell_is_requeued_and_the_count_begins_anew(
    batch: Batch, tmp_path: Path, told: str
) -> None:
    (tmp_path / "comment").write_text("softmoe_stuck=2")
    assert "interrupted, and saved: requeued" in batch(75, TOLD=told)
    assert (tmp_path / "comment").read_text() == "softmoe_stuck=0\n"
    assert requeues(tmp_path) == 1
