"""A process in which nothing moves ends, whatever is stuck; what several ranks tell each other is tests/ranks/test_hang.py."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from softmoe_train.dist import World, process_group
from softmoe_train.faults.hang import DAY_SECONDS, Silence, watched
from softmoe_train.launching.worker import HUNG
from tests.runs import ending

ALONE = World(0, 1, 0, 1)
LIMIT = 0.5  # seconds


def test_only_time_that_the_process_lived_through_is_silence() -> None:
    now = 0.0
    silence = Silence(5.0, lambda: now)

    def after(seconds: float, signs: int) -> float:
        nonlocal now
        now += seconds
        silence.look(signs)
        return silence.seconds

    assert [after(5, 1), after(5, 1), after(6, 1)] == [0, 5, 11]
    assert after(7200, 1) == 21  # it was stopped: that is two looks, not two hours
    assert after(7200, 2) == 0
    assert [after(5, 2), after(5, 3), after(5, 3)] == [5, 0, 5]


def stick(folder: Path) -> None:
    state = SimpleNamespace(step=12)
    with (
        process_group(ALONE, torch.device("cpu")),
        watched(ALONE, minutes=LIMIT / 60, folder=folder, exit_code=4) as watch,
    ):
        watch.begin(state)
        state.step = 13
        dist.HashStore().wait(["never"])  # in C++, which no signal handler of Python's can interrupt


def test_a_process_in_which_nothing_moves_shows_where_it_is_and_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, seconds = ending(lambda: stick(tmp_path))
    assert code == HUNG
    assert seconds < 10
    kept = (tmp_path / "hangs" / "rank_00000.txt").read_text()
    assert "rank 0 is in stick" in kept.splitlines()[0]
    assert "in stick" in kept.split("Thread ")[-1]  # of the main thread, which was in C++
    said = capfd.readouterr().err
    assert said.startswith(f"rank 0 at {kept}softmoe train: hang: nothing moved for ")
    assert f"after step 13. Stacks are in {tmp_path}/hangs; the same command goes on" in said


def test_a_disk_that_is_stuck_does_not_keep_it_from_ending(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hangs").mkdir()
    os.mkfifo(tmp_path / "hangs" / "rank_00000.txt")  # to open it waits for a reader
    assert ending(lambda: stick(tmp_path))[0] == HUNG
    said = capfd.readouterr().err
    assert "in stick" in said
    assert "Stacks are not kept: not written in time" in said


def test_steps_and_batches_are_signs_of_life_and_nothing_is_left_behind(tmp_path: Path) -> None:
    def work() -> None:
        before = threading.active_count()
        state = SimpleNamespace(step=0)
        with (
            process_group(ALONE, torch.device("cpu")),
            watched(ALONE, minutes=LIMIT / 60, folder=tmp_path, exit_code=4) as watch,
        ):
            time.sleep(3 * LIMIT)  # nothing is counted before it begins
            watch.begin(state)
            for _ in watch.over(range(4)):
                time.sleep(LIMIT / 2)
            for _ in range(4):
                state.step += 1
                time.sleep(LIMIT / 2)
        assert threading.active_count() == before
        os._exit(7)

    assert ending(work)[0] == 7
    assert not (tmp_path / "hangs").exists()


@pytest.mark.parametrize(("minutes", "seconds"), [(20.0, 2 * 20 * 60 + DAY_SECONDS), (None, 30 * 60)])
def test_process_groups_wait_longer_than_the_watch_and_as_ever_without_one(
    tmp_path: Path, minutes: float | None, seconds: float
) -> None:
    threads = threading.active_count()
    with (
        process_group(ALONE, torch.device("cpu")),
        watched(ALONE, minutes=minutes, folder=tmp_path, exit_code=4) as watch,
    ):
        watch.begin(SimpleNamespace(step=0))
        group = dist.group.WORLD
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == seconds
        assert minutes is not None or threading.active_count() == threads
