"""Points as jobs of a SLURM that is a few lines of this file: which are found again, what a refusal does."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softmoe_train.config import ConfigError, compose
from softmoe_train.launching.worker import RESUME
from softmoe_train.settings import RunConfig
from softmoe_train.sweep import job_end, jobs
from softmoe_train.sweep.drive import exit_code
from softmoe_train.sweep.jobs import SlurmJobs
from softmoe_train.sweep.ledger import FILE, Ledger
from softmoe_train.sweep.outcome import Outcome
from softmoe_train.sweep.points import Point
from softmoe_train.sweep.show import Show
from softmoe_train.sweep.slurm_queue import Queued
from softmoe_train.sweep.submitted import SubmittedPoint
from tests.unit.sweep.holding import held_by_another

LOOKS = 2  # at the queue, in which a job is there


class FakeSlurm:
    """Takes jobs, shows each for some looks, and completes it; `refusals` is what it says to the next submissions instead."""

    def __init__(self) -> None:
        self.there: dict[str, Queued] = {}
        self.folders: dict[str, str] = {}  # of runs, by job
        self.names: list[str] = []  # of all submissions that were tried
        self.refusals: list[str] = []
        self.takes_refused = False  # a socket that timed out, where the job went in all the same
        self.looks: dict[str, int] = {}
        self.complete: set[str] = set()  # run folders

    def add(self, name: str, folder: str, number: str | None = None, looks: int = LOOKS) -> str:
        number = number or str(100 + len(self.names))
        self.there[number] = Queued(number, "RUNNING", name)
        self.looks[number], self.folders[number] = looks, folder
        return number

    def queue(self) -> list[Queued]:
        for number in [number for number in self.there if not self.looks[number]]:
            del self.there[number]
            self.complete.add(self.folders.pop(number))
        self.looks = {number: looks - 1 for number, looks in self.looks.items()}
        return list(self.there.values())

    def submit(self, point: SubmittedPoint, name: str, folder: Path, settings: dict[str, Any]) -> str:
        self.names.append(name)
        if self.refusals:
            if self.takes_refused:
                self.add(name, point.folder)
            raise ConfigError([f"SLURM does not take the job {name}: {self.refusals.pop(0)}"])
        return self.add(name, point.folder)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(jobs, "queue", fake.queue)
    monkeypatch.setattr(jobs, "submit", fake.submit)
    monkeypatch.setattr(job_end, "state_of", lambda _: None)
    monkeypatch.setattr(job_end, "restarts_of", lambda _: None)
    for module in (jobs, job_end):
        monkeypatch.setattr(module, "is_complete", lambda config: config.run_dir in fake.complete)
    monkeypatch.setattr(jobs, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "CALM_SECONDS", 0.0)
    return fake


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(RunConfig, ["recipe=debug"], lambda _: [])


@pytest.fixture
def points(config: RunConfig, tmp_path: Path) -> list[Point]:
    made = []
    for seed in range(2):
        run = config.model_copy(update={"run_dir": str(tmp_path / "sweep" / f"seed={seed}"), "seed": seed})
        made.append(Point(f"seed={seed}", [f"seed={seed}"], {"seed": str(seed)}, {}, run))
    (tmp_path / "sweep").mkdir()
    return made


def start(points: list[Point], folder: Path, name: str | None = None, at_once: int = 8) -> list[Outcome]:
    """One start of the sweep, reached as `folder`."""
    settings = {"name": name, "array_parallelism": at_once, "max_num_timeout": 0}
    return SlurmJobs("train", folder, settings, 0, Show()).run(points, Ledger(folder / FILE))


def test_the_jobs_of_a_sweep_are_found_through_a_link_and_with_another_name(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("sweep")
    assert exit_code(start(points, tmp_path / "sweep")) == 0
    assert len(slurm.names) == 2
    first, second = slurm.names
    slurm.complete.clear()
    (tmp_path / "sweep" / FILE).unlink()  # a kill came before the ledger could be told
    for number, name, point in (("7", first, points[0]), ("8", second, points[1])):
        slurm.add(name, str(point.folder), number)
    assert exit_code(start(points, tmp_path / "link", name="mine")) == 0
    assert len(slurm.names) == 2


def test_a_job_is_found_by_the_number_in_the_ledger_where_its_name_is_of_another_folder(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "sweep" / FILE)
    for number, point in zip(("7", "8"), points, strict=True):
        ledger.start(point, job=number)
    slurm.add("softmoe-0123456789-seed=0", str(points[0].folder), "7")
    slurm.add("interactive", "/nowhere", "8")  # somebody else's by now
    assert exit_code(start(points, tmp_path / "sweep")) == 0
    assert [name.rpartition("-")[2] for name in slurm.names] == ["seed=1"]


def test_a_job_that_slurm_has_but_does_not_show_is_waited_for(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(tmp_path / "sweep" / FILE).start(points[0], job="7")
    states = ["PENDING", "RUNNING", "COMPLETING", "CANCELLED"]
    monkeypatch.setattr(job_end, "state_of", lambda _: states.pop(0) if len(states) > 1 else states[0])
    (outcome,) = start(points[:1], tmp_path / "sweep")
    assert (outcome.state, slurm.names) == ("interrupted", [])
    assert [one["job"] for one in Ledger(tmp_path / "sweep" / FILE).of("seed=0", "ended")] == ["7"]


def test_a_point_whose_checkpoints_another_process_holds_is_submitted_after_that(
    points: list[Point],
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    apart = tmp_path / "apart"
    checkpoint = points[0].config.checkpoint.model_copy(update={"folder": str(apart)})
    held = replace(points[0], config=points[0].config.model_copy(update={"checkpoint": checkpoint}))
    until_then: list[str] = []
    with ExitStack() as holding:
        holding.enter_context(held_by_another(apart))

        def queue() -> list[Queued]:
            if len(slurm.complete) == 1 and not until_then:  # the other point
                until_then.extend(slurm.names)
                holding.close()
            return slurm.queue()

        monkeypatch.setattr(jobs, "queue", queue)
        assert exit_code(start([held, points[1]], tmp_path / "sweep")) == 0
    assert [name.rpartition("-")[2] for name in until_then] == ["seed=1"] and len(slurm.names) == 2
    assert capsys.readouterr().out.count("seed=0: in use by process") == 1


def test_a_submission_that_slurm_refuses_for_a_moment_is_tried_again(
    points: list[Point],
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> list[Queued]:
        slurm.refusals = ["QOSMaxSubmitJobPerUserLimit"] * 3 if len(slurm.names) == 1 else slurm.refusals
        return slurm.queue()

    monkeypatch.setattr(jobs, "queue", refuse)
    assert exit_code(start(points, tmp_path / "sweep", at_once=1)) == 0
    assert [name.rpartition("-")[2] for name in slurm.names] == ["seed=0", *["seed=1"] * 4]
    said = capsys.readouterr().out
    assert said.count("seed=1: SLURM does not take the job") == said.count("QOSMaxSubmitJobPerUserLimit") == 1


def test_a_job_that_went_in_though_the_answer_was_lost_is_not_submitted_again(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.takes_refused = True
    slurm.add("other", "/nowhere")
    ledger = Ledger(tmp_path / "sweep" / FILE)
    ledger.start(points[0], job="7")
    slurm.add("softmoe-0123456789-seed=0", str(points[0].folder), "7")
    slurm.refusals = ["Socket timed out on send/recv operation"]
    assert exit_code(start(points, tmp_path / "sweep")) == 0
    assert len(slurm.names) == 1
    assert len(Ledger(tmp_path / "sweep" / FILE).of("seed=1", "started")) == 1


def test_what_is_refused_again_and_again_is_left_to_do(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger(tmp_path / "sweep" / FILE).start(points[0], job="7")
    slurm.add("softmoe-0123456789-seed=0", str(points[0].folder), "7")
    slurm.refusals = ["no"] * 1000
    outcomes = start(points, tmp_path / "sweep")
    assert [one.state for one in outcomes] == ["complete", "to do"] and exit_code(outcomes) == RESUME
    assert jobs.REFUSALS <= len(slurm.names) < jobs.REFUSALS + 2 * LOOKS + 2
    assert "1 points were not submitted: SLURM refused it again and again" in capsys.readouterr().out


def test_what_is_refused_before_anything_began_ends_the_sweep_with_the_words_of_slurm(
    points: list[Point], slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.refusals = ["Invalid account"]
    with pytest.raises(ConfigError, match="Invalid account"):
        start(points, tmp_path / "sweep")
    assert len(slurm.names) == 1
