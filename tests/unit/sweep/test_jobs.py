"""What a sweep makes of its jobs: how each ended, which plugins it takes, where pickles may lie."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.config import ConfigError, compose, expand_sweep
from softmoe_train.settings import RunConfig
from softmoe_train.sweep import job_end, plugins
from softmoe_train.sweep.drive import placed
from softmoe_train.sweep.job_end import end_of
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


def note(folder: Path, rank: int, code: int, *, asked: str | None = None, time: float = 0.0, restart: int = 0) -> None:
    content = {"rank": rank, "code": code, "asked": [asked] if asked else [], "time": time}
    (folder / f"7_{restart}_{rank}.json").write_text(json.dumps(content))


def test_the_rank_that_failed_first_is_named_and_not_those_that_were_ended_by_it(point: Point, tmp_path: Path) -> None:
    note(tmp_path, 0, 143, asked="SIGTERM", time=1.0)
    note(tmp_path, 1, 143, asked="SIGTERM", time=1.0)
    note(tmp_path, 2, 1, time=2.0)
    note(tmp_path, 3, 1, time=3.0)
    outcome, time_is_up = end_of(point, "7", tmp_path)
    assert (outcome.state, outcome.code, time_is_up) == ("failed", 1, False)
    assert outcome.reason.startswith("rank 2 failed (exit code 1)") and "output.2.log" in outcome.reason


@pytest.mark.parametrize(
    ("asked", "goes_on"), [("SIGUSR1", True), (None, True), ("SIGTERM", False)]
)  # None: the run's own time_limit
def test_a_job_whose_time_was_up_goes_on_and_one_that_somebody_cancelled_waits_for_them(
    point: Point, tmp_path: Path, asked: str | None, goes_on: bool
) -> None:
    for rank in (0, 1):
        note(tmp_path, rank, RESUME, asked=asked)
    outcome, time_is_up = end_of(point, "7", tmp_path)
    assert (outcome.state, time_is_up) == ("interrupted", goes_on)


def test_only_the_last_start_of_a_requeued_job_counts(point: Point, tmp_path: Path) -> None:
    note(tmp_path, 1, 1, restart=0)
    note(tmp_path, 0, RESUME, asked="SIGUSR1", restart=1)
    assert end_of(point, "7", tmp_path).outcome.state == "interrupted"
    (tmp_path / "7_2_0.json").write_text("{torn")  # passed over
    assert end_of(point, "7", tmp_path).outcome.state == "interrupted"


@pytest.mark.parametrize(
    ("state", "became"),
    [("TIMEOUT", "interrupted"), ("CANCELLED by 0", "interrupted"), ("NODE_FAIL", "interrupted"), (None, "interrupted"), ("OUT_OF_MEMORY", "failed")],
)  # fmt: skip
def test_of_a_job_without_notes_slurm_decides(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None, became: str
) -> None:
    monkeypatch.setattr(job_end, "state_of", lambda _: state)
    outcome, time_is_up = end_of(point, "7", tmp_path)
    assert (outcome.state, time_is_up) == (became, state == "TIMEOUT")
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
