"""Real processes: what a launch of two workers does when all goes well, when one fails, and when it is told to stop."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from softmoe_train.cores import usable_cores
from softmoe_train.launching.local import ONE_SIGNAL_SECONDS, TOLD_CODES, Ended, launch_local, report_failure
from softmoe_train.launching.worker import RESUME
from tests.under_way import UnderWay

ROOT = Path(__file__).resolve().parents[3]
LAUNCH, WORKER = "tests.launch_program", "tests.unit.launching.worker_program"
Launch = subprocess.Popen[str] | UnderWay


def start(mode: str, folder: Path, grace: int = 2, *, anew: bool = False) -> Launch:
    """A launch of two workers, all forked from a process that has their imports, or started `anew`."""
    words = ["2", str(grace), ",".join(map(str, TOLD_CODES)), WORKER, mode, str(folder)]
    if not anew:
        return UnderWay(*words, folder=ROOT, module=LAUNCH, modules=(WORKER,))
    return subprocess.Popen(
        [sys.executable, "-m", LAUNCH, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(launch: Launch) -> tuple[int, str]:
    out, err = launch.communicate(timeout=60)
    assert out == "" and launch.returncode is not None
    return launch.returncode, err


def pids(folder: Path, *names: str) -> list[int]:
    deadline = time.monotonic() + 40
    paths = [folder / f"{name}.pid" for name in names]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, sorted(folder.iterdir())
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def seconds_until_gone(processes: list[int], limit: float) -> float:
    begin = time.monotonic()
    while any(is_running(pid) for pid in processes):
        assert time.monotonic() - begin < limit, "still running"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.glob("*.pid"):  # a failed test must not leave its workers behind
        if is_running(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_workers_form_one_group_and_end_well(folder: Path) -> None:
    assert finish(start("sum", folder)) == (0, "")
    assert [(folder / f"sum{rank}").read_text() for rank in range(2)] == ["3 of 2"] * 2


@pytest.mark.parametrize("chosen", [None, "5"])
def test_each_worker_gets_its_share_of_the_cores_unless_the_user_chose(
    folder: Path, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = f"import os; open({str(folder)!r} + '/' + os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv("OMP_NUM_THREADS", chosen) if chosen else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch_local(2, [sys.executable, "-c", writes], grace_seconds=1) == 0
    share = str(max(1, usable_cores() // 2))
    assert [(folder / str(rank)).read_text() for rank in range(2)] == [chosen or share] * 2


def test_the_traceback_of_the_rank_that_failed_first_is_printed_once_and_last(folder: Path) -> None:
    code, err = finish(start("raise", folder))
    assert code == 1
    assert err.count("Traceback") == 1
    lines = err.strip().splitlines()
    assert "rank 1 failed first:" in lines
    assert lines[-1] == "RuntimeError: expert 7 is on fire"
    assert lines.count(lines[-1]) == 1
    assert len(lines) < 15, err


def test_a_survivor_that_ignores_signals_is_ended_within_seconds(folder: Path) -> None:
    launch = start("raise-and-hang", folder)
    workers = pids(folder, "rank0", "rank1")
    begin = time.monotonic()
    code, err = finish(launch)
    assert code == 1
    assert time.monotonic() - begin < 12  # three seconds of grace, and the start of two interpreters
    assert err.strip().endswith("RuntimeError: expert 7 is on fire")
    assert not any(map(is_running, workers))


def test_a_rank_that_was_killed_is_named_and_not_the_errors_it_caused(folder: Path) -> None:
    code, err = finish(start("killed", folder))
    assert code == 128 + signal.SIGKILL
    assert err.strip().splitlines()[-1] == "rank 1 failed first: it was ended by SIGKILL"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("raised", "by_itself", "code"),
    [(999.98, True, 128 + signal.SIGKILL), (997.0, True, 1), (999.98, False, 1)],
    ids=["in the same second", "seconds before", "killed by the agent"],
)
def test_a_kill_comes_before_the_errors_of_the_second_before_it_was_seen(
    folder: Path, capsys: pytest.CaptureFixture[str], raised: float, by_itself: bool, code: int
) -> None:
    error_file = folder / "error.json"
    error_file.write_text(
        json.dumps({"message": {"message": "E", "extraInfo": {"py_callstack": "E", "timestamp": "999"}}})
    )
    os.utime(error_file, (raised, raised))
    failures = {
        0: ProcessFailure(local_rank=0, pid=10, exitcode=1, error_file=str(error_file)),
        1: ProcessFailure(local_rank=1, pid=11, exitcode=-signal.SIGKILL, error_file=str(folder / "none")),
    }
    assert report_failure(failures, Ended({0, 1} if by_itself else {0}, seen=1000.03)) == code
    first = 0 if code == 1 else 1
    assert f"rank {first} failed first" in capsys.readouterr().err


def test_an_exit_code_of_a_worker_is_the_exit_code_of_the_launch(folder: Path) -> None:
    code, err = finish(start("code", folder))
    assert code == 7
    assert err.strip() == "rank 1 failed first: it exited with 7"


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [("sleep", signal.SIGINT, 130), ("stubborn", signal.SIGTERM, 143)],
)
def test_a_signal_ends_all_ranks_within_seconds(folder: Path, mode: str, number: int, code: int) -> None:
    launch = start(mode, folder)
    workers = pids(folder, "rank0", "rank1")
    time.sleep(0.5)
    begin = time.monotonic()
    launch.send_signal(number)
    assert finish(launch) == (code, "")
    assert time.monotonic() - begin < 15  # the grace is 2, and a busy machine needs some to end processes
    assert not any(map(is_running, workers))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_within_the_grace_after_a_signal_the_ranks_can_save_and_their_code_is_the_launchs(
    folder: Path, number: signal.Signals
) -> None:
    launch = start("save", folder, grace=20)
    pids(folder, "rank0", "rank1")
    begin = time.monotonic()
    launch.send_signal(number)
    time.sleep(0.1)
    launch.send_signal(number)  # as timeout(1) does: it is one signal still
    assert finish(launch) == (RESUME, "")
    assert time.monotonic() - begin < 10  # it waits for them, not for the grace
    assert [(folder / f"saved{rank}").exists() for rank in range(2)] == [True, True]
    assert [(folder / f"told{rank}").read_text() for rank in range(2)] == [f"{number.name} "] * 2


def test_a_second_signal_ends_all_ranks_at_once(folder: Path) -> None:
    launch = start("stubborn", folder, grace=60)
    workers = pids(folder, "rank0", "rank1")
    launch.send_signal(signal.SIGTERM)
    time.sleep(ONE_SIGNAL_SECONDS + 0.1)
    assert all(map(is_running, workers))
    begin = time.monotonic()
    launch.send_signal(signal.SIGINT)
    assert finish(launch) == (130, "")
    assert time.monotonic() - begin < 3
    assert not any(map(is_running, workers))


def test_a_worker_that_ends_to_be_resumed_leaves_the_others_their_time(folder: Path) -> None:
    assert finish(start("resume", folder, grace=20)) == (RESUME, "")
    assert (folder / "closed").exists()


def test_a_killed_launcher_leaves_no_worker_and_no_decoder(folder: Path) -> None:
    launch = start("decode", folder, anew=True)
    processes = pids(folder, "rank0", "rank1", "decode0", "decode1")
    assert all(map(is_running, processes))
    launch.kill()
    assert seconds_until_gone(processes[:2], limit=5) < 1  # the kernel does this
    seconds_until_gone(processes[2:], limit=8)  # torch's decoders look for their parent every 5 s
    launch.communicate()


def test_a_launch_leaves_nothing_in_the_process_that_made_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[dict[str, str], list[object]]:
        return dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = settings()
    assert launch_local(2, [sys.executable, "-c", "raise SystemExit(3)"], grace_seconds=1) == 3
    assert before == settings()
    assert list(folder.iterdir()) == []
