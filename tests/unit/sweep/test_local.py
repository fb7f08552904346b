"""The grid on this machine, with points that are programs of a few lines: room, failures, signals, folders in use."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_train.config import compose, save_yaml
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.drive import exit_code
from softmoe_train.sweep.ledger import Ledger, open_ledger
from softmoe_train.sweep.local import LocalGrid
from softmoe_train.sweep.outcome import Outcome, log_of
from softmoe_train.sweep.points import Point
from softmoe_train.sweep.room import Room, named_devices, room_for, room_problems
from softmoe_train.sweep.show import Show
from tests.unit.sweep.holding import held_by_another

COMPLETE = """
open("summary.json", "w").write('{"ended": "complete", "steps": 20}')
"""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(RunConfig, ["recipe=debug"], lambda _: [])


@pytest.fixture
def points(config: RunConfig, tmp_path: Path) -> Callable[..., list[Point]]:
    """Points of a sweep in a folder of the test, all as `changes` says."""

    def some(count: int, **changes: object) -> list[Point]:
        made = []
        for seed in range(count):
            folder = tmp_path / f"seed={seed}"
            run = config.model_copy(update={"run_dir": str(folder), "seed": seed, **changes})
            folder.mkdir(exist_ok=True)
            save_yaml(run.as_saved(), folder / "config.yaml")
            made.append(Point(f"seed={seed}", [f"seed={seed}"], {"seed": str(seed)}, {}, run))
        return made

    return some


def run(
    points: list[Point], program: str, *, room: Room | None = None, retries: int = 0
) -> tuple[list[Outcome], Ledger]:
    """Run `program` for each point, in its folder."""
    begin = "import os, sys, time, signal; os.chdir(sys.argv[1])\n"

    def command(point: Point) -> list[str]:
        return [sys.executable, "-c", begin + program, str(point.folder)]

    with open_ledger(points[0].folder.parent) as ledger:
        grid = LocalGrid(command, room or room_for(points, None, []), retries, Show())
        return grid.run(points, ledger), ledger


def events(ledger: Ledger, label: str) -> list[str]:
    return [entry.get("state", entry["event"]) for entry in ledger.of(label)]


def test_points_run_one_after_another_and_never_again(points: Callable[..., list[Point]]) -> None:
    outcomes, ledger = run(points(2), "print('said')" + COMPLETE)
    assert [one.state for one in outcomes] == ["complete", "complete"] and exit_code(outcomes) == 0
    assert [entry["event"] for entry in ledger.entries] == ["started", "ended"] * 2
    assert "said" in log_of(outcomes[0].point).read_text()
    outcomes, ledger = run(points(3), COMPLETE)
    assert [one.reason for one in outcomes] == ["complete already", "complete already", "complete"]
    assert events(ledger, "seed=0") == ["started", "complete"]


def test_as_many_go_at_a_time_as_the_budget_has_room_for(points: Callable[..., list[Point]], tmp_path: Path) -> None:
    """Four points of two processes in a budget of five: two at a time, and each time two."""
    program = f"""
open("{tmp_path}/beside", "a").write(f"+{{os.getpid()}} "); time.sleep(0.7); open("{tmp_path}/beside", "a").write(f"-{{os.getpid()}} ")
{COMPLETE}"""
    some = points(4, processes=2)
    outcomes, _ = run(some, program, room=room_for(some, 5, []))
    assert {one.state for one in outcomes} == {"complete"}
    now, most = 0, []
    for mark in (tmp_path / "beside").read_text().split():
        now += 1 if mark[0] == "+" else -1
        most.append(now)
    assert max(most) == 2


def test_each_point_has_devices_of_its_own(points: Callable[..., list[Point]], tmp_path: Path) -> None:
    """Of those that are visible already; what runs on the CPU takes none."""
    program = "open('devices', 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', 'none')); time.sleep(0.7)" + COMPLETE
    some = points(2, device="auto", processes=2)
    names = named_devices({"CUDA_VISIBLE_DEVICES": "GPU-a, 5,7,9"}, 4)
    run(some, program, room=room_for(some, None, names))
    assert sorted(path.read_text() for path in tmp_path.glob("*/devices")) == ["7,9", "GPU-a,5"]
    assert named_devices({"CUDA_VISIBLE_DEVICES": ""}, 0) == [] and named_devices({}, 2) == ["0", "1"]
    assert room_for(points(1, device="cpu"), None, names).devices == ()
    (told,) = room_problems(some[:1], room_for(some[:1], 8, ["3"]))
    assert "processes=2 needs as many accelerators, and 1 is visible" in told


@pytest.mark.parametrize(("code", "attempts"), [(1, 3), (2, 1), (3, 1), (4, 3), (137, 3)])
def test_what_failed_is_tried_again_unless_it_would_end_in_the_same_way(
    points: Callable[..., list[Point]], code: int, attempts: int
) -> None:
    """And the other points run."""
    program = f"print('because')\nif sys.argv[1].endswith('0'): os._exit({code})\n{COMPLETE}"
    outcomes, ledger = run(points(2), program, retries=2)
    assert [one.state for one in outcomes] == ["failed", "complete"] and exit_code(outcomes) == code
    assert events(ledger, "seed=0") == ["started", "failed"] * attempts
    assert f"exit code {code}" in outcomes[0].reason and "because" in outcomes[0].reason
    for start in range(attempts + 1, 5):  # the next starts of the sweep: until it has been tried three times
        outcomes, ledger = run(points(1), program, retries=2)
        assert len(ledger.of("seed=0", "started")) == min(start, 3) or code not in (2, 3)
    assert "give sweep.retries=3" in outcomes[0].reason and exit_code(outcomes) == code
    outcomes, ledger = run(points(1), COMPLETE, retries=3)
    assert exit_code(outcomes) == 0


def test_a_flaky_point_is_complete_in_the_end(points: Callable[..., list[Point]]) -> None:
    program = f"if not os.path.exists('once'): open('once', 'w'); os.kill(os.getpid(), 9)\n{COMPLETE}"
    outcomes, ledger = run(points(1), program, retries=1)
    assert outcomes[0].state == "complete" and events(ledger, "seed=0") == ["started", "failed", "started", "complete"]


def test_a_point_that_is_asked_to_end_as_it_completes_is_complete(points: Callable[..., list[Point]]) -> None:
    (outcome,), ledger = run(points(1), COMPLETE + "sys.exit(143)")
    assert outcome.state == "complete" and exit_code([outcome]) == 0
    assert events(ledger, "seed=0") == ["started", "complete"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_goes_on_to_what_runs_and_nothing_more_is_started(
    points: Callable[..., list[Point]], number: int
) -> None:
    """A closed terminal as SIGTERM: a run that does not hear it would be killed with its sweep, unsaved."""
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    program = f"signal.signal({int(passed)}, lambda *_: os._exit(75)); open('ready', 'w'); time.sleep(60)"
    some = points(2)

    def ask() -> None:
        while not (some[0].folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        thread.start()
        outcomes, ledger = run(some, program)
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [one.state for one in outcomes] == ["interrupted", "to do"] and exit_code(outcomes) == 75
    assert events(ledger, "seed=0") == ["started", "interrupted"] and ledger.of("seed=1") == []


def test_under_nohup_a_closed_terminal_ends_nothing(points: Callable[..., list[Point]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        outcomes, _ = run(points(1), "os.kill(os.getppid(), signal.SIGHUP)" + COMPLETE)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcomes[0].state == "complete"


def test_an_attempt_that_found_its_folder_taken_has_an_end_and_is_no_failure(
    points: Callable[..., list[Point]],
) -> None:
    """Somebody was faster between our look and its start."""
    program = """
import fcntl
if not os.path.exists(".lock"):
    ready, told = os.pipe()
    if os.fork() == 0:
        lock = open(".lock", "a+"); fcntl.lockf(lock, fcntl.LOCK_EX); lock.write("process 1"); lock.flush(); os.write(told, b"x")
        until = time.monotonic() + 8
        while "faster" not in open("../ledger.jsonl").read() and time.monotonic() < until: time.sleep(0.05)
        os._exit(0)
    os.read(ready, 1); os._exit(2)
"""
    outcomes, ledger = run(points(1), program + COMPLETE)
    assert outcomes[0].state == "complete"
    assert events(ledger, "seed=0") == ["started", "interrupted", "started", "complete"]
    assert ledger.of("seed=0", "ended")[0]["reason"] == "in use by process 1, which was faster"


def test_a_folder_in_use_is_waited_for_while_others_run(
    points: Callable[..., list[Point]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever had it may have finished it."""
    some = points(2)
    with held_by_another(some[0].folder) as pid:

        def finish() -> None:
            while not (some[1].folder / "summary.json").exists():
                time.sleep(0.02)
            (some[0].folder / "summary.json").write_text('{"ended": "complete", "steps": 20}')
            os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=finish)
        thread.start()
        outcomes, ledger = run(some, COMPLETE)
        thread.join()
    assert [one.state for one in outcomes] == ["complete", "complete"]
    assert ledger.of("seed=0") == [] and events(ledger, "seed=1") == ["started", "complete"]
    assert f"seed=0: in use by process {pid}" in capsys.readouterr().out


def test_a_point_that_stops_itself_early_is_neither_complete_nor_failed(points: Callable[..., list[Point]]) -> None:
    outcomes, _ = run(points(1), """open("summary.json", "w").write('{"ended": "stopped", "steps": 7}')""")
    assert (outcomes[0].state, outcomes[0].reason, exit_code(outcomes)) == ("stopped", "stopped at step 7 of 20", 0)
