"""The claim on a run folder, with real processes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmoe_train.config import ConfigError, compose
from softmoe_train.faults.claim import claim, owner
from softmoe_train.settings import RunConfig, check
from tests.runs import environment

# Claims the folder and forks a child that outlives it, as a decode worker does.
HOLDER = """
import os, sys, time
from pathlib import Path
from softmoe_train.faults.claim import claim
with claim(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the folder, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_claim_is_refused_with_the_owner(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, child = holder
    assert (owner(tmp_path) or "").startswith(f"process {process.pid} on ")
    with pytest.raises(BlockingIOError, match=f"in use by process {process.pid} on"), claim(tmp_path):
        pass
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_folder_of_checkpoints_that_another_run_holds_is_refused(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = holder
    with pytest.raises(ConfigError) as told:
        compose(
            RunConfig,
            ["recipe=debug", f"run_dir={tmp_path}/run", f"checkpoint.folder={tmp_path}", "hang_limit=0.5"],
            lambda config: check(config, 1, 1),
        )
    in_use, retries = sorted(told.value.problems)
    assert in_use.startswith(f"checkpoint.folder={tmp_path} is in use by process {process.pid} on ")
    assert retries.startswith("hang_limit=0.5 with checkpoint.max_failures=3: a last save is tried again for 20 s")
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_killed_owner_leaves_nothing_behind_though_its_child_lives(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = holder
    process.kill()
    process.wait()
    began = time.monotonic()
    try:
        assert owner(tmp_path) is None
        with claim(tmp_path):
            pass
        assert time.monotonic() - began < 1
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_nobody_claimed_has_no_owner(tmp_path: Path) -> None:
    assert owner(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_deleted_is_taken_again_and_not_from_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claim(folder) as ours:
        first = (folder / ".lock").stat().st_ino
        ours.take()
        assert (folder / ".lock").stat().st_ino == first
        shutil.rmtree(folder)
        ours.take()
        assert (owner_seen_by_another(folder) or "").startswith(f"process {os.getpid()} on ")
        shutil.rmtree(folder)
        other = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        child = int(other.stdout.readline())
        with pytest.raises(BlockingIOError, match=f"in use by process {other.pid} on"):
            ours.take()
        other.kill()
        other.wait()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOLCK, "No locks available; give it locks"),
        (errno.EACCES, "Permission denied; it may be another user's"),
    ],
)
def test_a_folder_that_cannot_be_locked_is_a_mistake_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    """Here every file system has locks, and root is every user."""
    (tmp_path / ".lock").touch()

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("softmoe_train.faults.claim.fcntl.lockf", refuse)
    for hold in (lambda: claim(tmp_path).__enter__(), lambda: owner(tmp_path)):
        with pytest.raises(ConfigError) as told:
            hold()
        assert str(tmp_path) in told.value.problems[0] and said in told.value.problems[0]


def test_a_lost_server_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("softmoe_train.faults.claim.fcntl.lockf", fail)
    with pytest.raises(OSError, match="Input/output error"), claim(tmp_path):
        pass


def owner_seen_by_another(folder: Path) -> str | None:
    """A process is never refused its own record lock, so another must look."""
    look = "import sys; from pathlib import Path; from softmoe_train.faults.claim import owner; print(owner(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", look, str(folder)], env=environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
