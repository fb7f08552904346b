"""What becomes of a run's files when the disk does not take them: a warning, and nothing is missing in the end."""

import json
import shutil
from pathlib import Path

import pytest

from softmoe_train.faults.claim import claim
from softmoe_train.observe.log import SilentLog, build_log
from tests.disks import fill, read_only, small_disk
from tests.unit.observe.test_log import config


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def started(run: Path, **more: object) -> SilentLog:
    return build_log(
        config(), run, name="r", run_config={}, total_steps=9, main=True, wandb_id="id", resume_step=0, **more
    )  # pyright: ignore[reportArgumentType]


def test_reports_that_a_full_or_a_read_only_disk_did_not_take_come_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        log, filling = started(disk / "run"), disk / "of_others"
        log.report(1, 10, {"train/loss": 1.0})
        fill(filling)
        for step in range(2, 60):  # more than the last block holds
            log.report(step, 10 * step, {f"train/loss_{i}": 1.0 for i in range(5)})
        assert steps(disk / "run")[0] == 1
        assert all(json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()), (
            "none is torn"
        )
        filling.unlink()
        log.report(60, 600, {"train/loss": 1.0})
        assert steps(disk / "run") == list(range(1, 61))
        with read_only(disk):
            log.report(61, 610, {"train/loss": 1.0})
        log.close("complete", failed=False)
        assert steps(disk / "run") == list(range(1, 62))
        assert json.loads((disk / "run" / "summary.json").read_text())["ended"] == "complete"
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl and summary.json cannot be written ([Errno 28] No space left") == 1
    assert said.count("cannot be written ([Errno 30] Read-only file system") == 1
    assert said.count("are written again, and lack nothing") == 2


def test_what_is_not_written_at_the_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        log = started(disk / "run")
        with read_only(disk):
            log.report(1, 10, {"train/loss": 1.0})
            log.report(2, 20, {"train/loss": 1.0})
            log.close("complete", failed=False)
    assert "2 reports are not in metrics.jsonl" in capsys.readouterr().out


def test_a_folder_that_is_deleted_is_made_again_and_not_written_to_where_another_run_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, places = tmp_path / "run", []

    def make_folder() -> None:
        places.append("made")
        if len(places) == 3:
            raise BlockingIOError("run is in use by process 1")
        run.mkdir(exist_ok=True)

    log = started(run, make_folder=make_folder)
    log.report(1, 10, {"train/loss": 1.0})
    shutil.rmtree(run)
    log.report(2, 20, {"train/loss": 1.0})
    assert steps(run) == [2]
    assert "the run folder was deleted or replaced: from step 2 on it is written anew" in capsys.readouterr().out
    shutil.rmtree(run)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "images_seen": 10}\n')
    with pytest.raises(BlockingIOError, match="in use by process 1"):
        log.report(3, 30, {"train/loss": 1.0})
    assert steps(run) == [1], "the other's"
    assert places == ["made"] * 3


def test_a_claim_makes_the_folder(tmp_path: Path) -> None:
    with claim(tmp_path / "run") as held:
        log = started(tmp_path / "run", make_folder=held.take)
        shutil.rmtree(tmp_path / "run")
        log.report(1, 10, {"train/loss": 1.0})
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl", "summary.json"]
