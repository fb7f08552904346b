"""What a sweep makes of its jobs: how each ended, which plugins it takes, where pickles may lie."""

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.config import ConfigError, compose, expand_sweep
from softmoe_train.settings import RunConfig
from softmoe_train.sweep import job_end, plugins, submission, submitted
from softmoe_train.sweep.drive import placed
from softmoe_train.sweep.job_end import JobEnd, end_of
from softmoe_train.sweep.plugins import keys_that_vary, plugin_problems
from softmoe_train.sweep.points import Kind, Point
from softmoe_train.sweep.settings import compose_sweep, words_of
from softmoe_train.sweep.submission import keep_private
from softmoe_train.sweep.submitted import RESUME, SubmittedPoint
from tests.documented import Line, lines


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Point:
    folder = tmp_path_factory.mktemp("point")
    return Point(
        "seed=1", [], {"seed": "1"}, {}, compose(RunConfig, ["recipe=debug", f"run_dir={folder}"], lambda _: [])
    )


@pytest.fixture(autouse=True)
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what SLURM remembers of every job; nothing, until that is called."""

    def says(state: str | None, restarts: int | None = None) -> None:
        monkeypatch.setattr(job_end, "state_of", lambda _: state)
        monkeypatch.setattr(job_end, "restarts_of", lambda _: restarts)

    monkeypatch.setattr(job_end, "DISK_SECONDS", 0.0)
    says(None)
    return says


def end(point: Point, folder: Path) -> JobEnd:
    """What became of job 7, which is over."""
    found = end_of(point, "7", folder)
    assert found is not None
    return found


def note(
    folder: Path,
    rank: int,
    code: int,
    *,
    asked: str | None = None,
    time: float = 0.0,
    restart: int = 0,
    requeued: bool = False,
) -> None:
    content = {"rank": rank, "code": code, "asked": [asked] if asked else [], "time": time, "requeued": requeued}
    (folder / f"7_{restart}_{rank}.json").write_text(json.dumps(content))


def test_the_rank_that_failed_first_is_named_and_not_those_that_were_ended_by_it(point: Point, tmp_path: Path) -> None:
    note(tmp_path, 0, 143, asked="SIGTERM", time=1.0)
    note(tmp_path, 1, 143, asked="SIGTERM", time=1.0)
    note(tmp_path, 2, 1, time=2.0)
    note(tmp_path, 3, 1, time=3.0)
    outcome, again = end(point, tmp_path)
    assert (outcome.state, outcome.code, again) == ("failed", 1, False)
    assert outcome.reason.startswith("rank 2 failed (exit code 1)") and "output.2.log" in outcome.reason


@pytest.mark.parametrize(
    ("asked", "state", "goes_on"),
    [
        ("SIGUSR1", None, True),
        (None, None, True),  # the run's own time_limit
        ("SIGTERM", "CANCELLED", False),
        ("SIGTERM", "FAILED", True),  # preempted: it had saved before SLURM ended it
        ("SIGTERM", None, False),  # SLURM has forgotten which
    ],
)
def test_a_job_that_ran_out_of_time_or_was_preempted_goes_on_and_one_that_somebody_cancelled_waits_for_them(
    point: Point, tmp_path: Path, slurm_says: Callable[..., None], asked: str | None, state: str | None, goes_on: bool
) -> None:
    slurm_says(state)
    for rank in (0, 1):
        note(tmp_path, rank, RESUME, asked=asked)
    outcome, again = end(point, tmp_path)
    assert (outcome.state, again) == ("interrupted", goes_on)


def test_only_the_last_start_of_a_requeued_job_counts(
    point: Point, tmp_path: Path, slurm_says: Callable[..., None]
) -> None:
    note(tmp_path, 1, 1, restart=0)
    note(tmp_path, 0, RESUME, asked="SIGUSR1", restart=1)
    assert end(point, tmp_path).goes_on
    (tmp_path / "7_2_0.json").write_text("{torn")  # there was a start 2, so what start 1 noted is not how the job ended
    slurm_says("OUT_OF_MEMORY")
    assert end(point, tmp_path).outcome.state == "failed"
    note(tmp_path, 0, RESUME, asked="SIGUSR1", restart=2)
    assert end(point, tmp_path).goes_on
    slurm_says("NODE_FAIL", restarts=3)  # of which no task could note anything
    assert end(point, tmp_path)[1:] == (False,) and "NODE_FAIL" in end(point, tmp_path).outcome.reason


@pytest.mark.parametrize(
    ("state", "goes_on"),
    [("CANCELLED", False), ("NODE_FAIL", False), (None, False), ("TIMEOUT", True), ("PREEMPTED", True)],
)
def test_of_a_job_that_had_itself_requeued_and_noted_nothing_since_slurm_decides(
    point: Point, tmp_path: Path, slurm_says: Callable[..., None], state: str | None, goes_on: bool
) -> None:
    note(tmp_path, 0, RESUME, asked="SIGUSR1", requeued=True)
    note(tmp_path, 1, RESUME, asked="SIGUSR1")
    slurm_says(state)
    outcome, again = end(point, tmp_path)
    assert (outcome.state, again) == ("interrupted", goes_on)
    assert (state or "forgotten") in outcome.reason


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize(
    "state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT"]
)
def test_a_job_that_slurm_still_has_is_not_over(
    point: Point, tmp_path: Path, slurm_says: Callable[..., None], state: str, noted: bool
) -> None:
    if noted:
        note(tmp_path, 0, RESUME, asked="SIGUSR1", requeued=True)
    slurm_says(state)
    assert end_of(point, "7", tmp_path) is None


@pytest.mark.parametrize(
    ("state", "became"),
    [("TIMEOUT", "interrupted"), ("CANCELLED by 0", "interrupted"), ("NODE_FAIL", "interrupted"), (None, "interrupted"), ("OUT_OF_MEMORY", "failed")],
)  # fmt: skip
def test_of_a_job_without_notes_slurm_decides(
    point: Point, tmp_path: Path, slurm_says: Callable[..., None], state: str | None, became: str
) -> None:
    slurm_says(state)
    outcome, again = end(point, tmp_path)
    assert (outcome.state, again) == (became, state == "TIMEOUT")
    assert "job 7" in outcome.reason


def test_a_task_ends_with_the_code_of_its_run_and_notes_it(tmp_path: Path) -> None:
    point = SubmittedPoint(("no-such-verb",), str(tmp_path / "run"), str(tmp_path), 0)
    program = f"from softmoe_train.sweep.submitted import SubmittedPoint\nprint({point!r}())"
    environ = {**os.environ, "SLURM_PROCID": "3", "SLURM_JOB_ID": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    kept = json.loads((tmp_path / "7_0_3.json").read_text())
    assert (kept["rank"], kept["code"], kept["requeued"]) == (3, 2, False)
    said = (tmp_path / "run" / "output.3.log").read_text()
    assert "job 7: softmoe no-such-verb" in said and "invalid choice" in said


@pytest.mark.parametrize("taken", [True, False])
def test_a_requeue_that_slurm_does_not_take_is_not_noted_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def run(self: SubmittedPoint, rank: int, runs: list[object], asked: list[str]) -> int:
        asked.append("SIGUSR1")
        return RESUME

    def ends(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(SubmittedPoint, "_run", run)
    monkeypatch.setattr(submitted.signal, "signal", lambda *_: None)
    monkeypatch.setattr(submitted.os, "_exit", ends)
    monkeypatch.setattr(
        submitted.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0 if taken else 1)
    )
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=str(RESUME)):
        SubmittedPoint((), str(tmp_path), str(tmp_path), 2)()
    assert json.loads((tmp_path / "7_1_0.json").read_text())["requeued"] is taken


def test_pickles_are_kept_where_nobody_else_writes(tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / ".submitit"
    keep_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keep_private(folder)
    for mode in (0o755, 0o770, 0o701):
        folder.chmod(mode)
        with pytest.raises(ConfigError, match=f"has mode {mode:o}: it holds pickles"):
            keep_private(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="it holds pickles"):
        keep_private(tmp_path / "link")


def test_no_folder_above_the_pickles_lets_others_put_another_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "above"
    folder = above / "sweep" / ".submitit"
    keep_private(folder)
    for open_one in (above, folder.parent):
        for mode, who in ((0o777, "everybody"), (0o770, f"group {above.stat().st_gid}"), (0o702, "everybody")):
            monkeypatch.setattr(submission, "_own_group", lambda: None)
            open_one.chmod(mode)
            with pytest.raises(ConfigError, match=f"{open_one} has mode {mode:o}: {who} may put another folder"):
                keep_private(folder)
            open_one.chmod(mode | stat.S_ISVTX)
            keep_private(folder)
        open_one.chmod(0o770)
        monkeypatch.setattr(submission, "_own_group", lambda: above.stat().st_gid)  # a private one, and umask 002
        keep_private(folder)
        open_one.chmod(0o700)
    above.chmod(0o777)
    (tmp_path / "link").symlink_to(folder.parent)
    with pytest.raises(ConfigError, match=f"{above} has mode 777"):
        keep_private(tmp_path / "link" / ".submitit")


def test_a_group_is_ones_own_where_it_has_ones_name_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.struct_passwd(("ann", "x", 1000, 1001, "", "/", "/bin/sh"))
    monkeypatch.setattr(submission.pwd, "getpwuid", lambda _: user)
    for name, members, own in (("ann", [], 1001), ("ann", ["ann"], 1001), ("ann", ["bob"], None), ("users", [], None)):
        group = grp.struct_group((name, "x", 1001, members))
        monkeypatch.setattr(submission.grp, "getgrgid", lambda _, group=group: group)
        assert submission._own_group() == own


def test_what_is_no_launcher_or_is_not_installed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin_problems("basic", "basic") == []
    (unknown,) = plugin_problems("submitit_local", "basic")
    assert "a sweep takes basic or submitit_slurm; leave it out: the sweep then runs on this machine" in unknown
    monkeypatch.setattr(plugins.importlib.util, "find_spec", lambda _: None)
    slurm, optuna = plugin_problems("submitit_slurm", "optuna")
    assert slurm.startswith("hydra/launcher=submitit_slurm needs hydra-submitit-launcher; pip install")
    assert optuna.startswith("hydra/sweeper=optuna needs hydra-optuna-sweeper; pip install")


@pytest.mark.parametrize("line", [line for line in lines() if "-m hydra/" in line.text], ids=lambda line: line.text)
def test_a_documented_sweep_is_of_points_that_may_start(line: Line) -> None:
    words = words_of(line.words[3:])
    settings, problems = compose_sweep(words)
    if any("pip install" in problem for problem in problems):
        pytest.skip(problems[0])
    assert settings is not None and problems == []
    kind = placed(Kind("train", compose_train, check_train), words)
    for point in [] if words.sweeper == "optuna" else expand_sweep(words.runs):
        compose_train([*point, *kind.also], kind.problems)
    assert kind.also == (("processes=8",) if words.launcher == "submitit_slurm" else ())


def test_a_key_varies_where_a_sweeper_may_choose() -> None:
    line = ["recipe=debug", "schedule.peak=interval(0.001,0.01)", "seed=1,2", "steps=range(1,5)", "name='a,b'"]
    assert keys_that_vary(line) == ["schedule.peak", "seed", "steps"]
