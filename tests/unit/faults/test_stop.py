"""Signals as one process meets them, and what it wants then; how ranks agree is tests/ranks/test_interruption.py."""

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from softmoe_train.dist import World
from softmoe_train.faults.stop import ASKING, ONE_SIGNAL_SECONDS, AgreedStop, agreed_stop, listening
from tests.runs import ending

ALONE = World(0, 1, 0, 1)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in ASKING]


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_heard_and_nothing_is_left_behind(number: signal.Signals) -> None:
    before = handlers(), len(os.listdir("/proc/self/fd"))
    with listening(0, 60, 75) as ear:
        assert ear.asked is None
        os.kill(os.getpid(), number)
        until(lambda: ear.asked == number)
        os.kill(os.getpid(), signal.SIGINT)  # so soon, it is the same request
        time.sleep(0.1)
        assert ear.asked == number
    assert (handlers(), len(os.listdir("/proc/self/fd"))) == before


def test_a_process_with_many_files_hears_too() -> None:
    """More than the 1024 that select(2) is able to watch."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 1200:
        pytest.skip(f"at most {most} files may be open here")
    with ExitStack() as files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1200), most))
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        while files.enter_context(open(os.devnull)).fileno() < 1024:
            pass
        with listening(0, 60, 75) as ear:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: ear.asked == signal.SIGTERM)


def test_a_second_signal_ends_a_process_that_waits_in_a_collective(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with listening(3, 60, 75):
            if os.fork() == 0:
                os.kill(os.getppid(), signal.SIGUSR1)
                time.sleep(ONE_SIGNAL_SECONDS + 0.1)
                os.kill(os.getppid(), signal.SIGINT)
                os._exit(0)
            dist.HashStore().wait(["never"])  # in C++, which no signal handler of Python's can interrupt

    code, seconds = ending(work)
    assert code == 130
    assert seconds < ONE_SIGNAL_SECONDS + 2
    assert capfd.readouterr().err == "rank 3 was ended: SIGINT after SIGUSR1: ended at once\n"


def test_a_process_that_does_not_end_in_its_grace_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with listening(0, 1, 75):
            os.kill(os.getpid(), signal.SIGTERM)
            dist.HashStore().wait(["never"])

    code, seconds = ending(work)
    assert code == 75
    assert 1 <= seconds < 3
    assert "1 s after SIGTERM (checkpoint.grace)" in capfd.readouterr().err


def fail_after_a_signal(grace_seconds: int) -> None:
    with listening(1, grace_seconds, 75) as ear:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: ear.asked is not None)
        raise RuntimeError("connection closed by peer")


def test_a_failure_when_the_grace_is_over_is_that_of_ranks_that_gave_up(capfd: pytest.CaptureFixture[str]) -> None:
    assert ending(lambda: fail_after_a_signal(1))[0] == 75
    assert "Traceback" not in capfd.readouterr().err


def test_a_failure_after_a_signal_is_a_failure_still() -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        fail_after_a_signal(60)


def test_a_signal_is_a_reason_one_step_later() -> None:
    ear = SimpleNamespace(asked=None)
    stop = AgreedStop(ear, None, None)  # pyright: ignore[reportArgumentType]
    assert [stop.agreed(), stop.agreed()] == [None, None]
    ear.asked = signal.SIGUSR1
    assert [stop.agreed(), stop.agreed()] == [None, "interrupted by SIGUSR1"]


def test_the_time_limit_is_a_reason() -> None:
    with agreed_stop(ALONE, ends_at=time.monotonic() + 3600, grace_seconds=60, exit_code=75) as stop:
        assert [stop.agreed() for _ in range(3)] == [None] * 3
    with agreed_stop(ALONE, ends_at=time.monotonic(), grace_seconds=60, exit_code=75) as stop:
        assert [stop.agreed() for _ in range(2)] == [None, "interrupted by time_limit"]
