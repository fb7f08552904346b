import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from softmoe_train.observe.log import ObserveConfig, RunLog, SilentLog, build_log

ROOT = Path(__file__).resolve().parents[3]


def config(mode: str = "disabled", progress: str = "plain") -> ObserveConfig:
    values = yaml.safe_load((ROOT / "conf/observe/default.yaml").read_text())
    values["progress"] = progress
    values["wandb"]["mode"] = mode
    return ObserveConfig.model_validate(values)


def open_log(run_dir: Path, resume_step: int = 0, main: bool = True, wandb_id: str | None = None) -> SilentLog:
    return build_log(
        config(),
        run_dir,
        name="r",
        run_config={},
        total_steps=660,
        main=main,
        wandb_id=wandb_id,
        resume_step=resume_step,
    )


def lines_of(run_dir: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_the_shipped_yaml_is_a_legal_config() -> None:
    values = yaml.safe_load((ROOT / "conf/observe/default.yaml").read_text())
    assert ObserveConfig.model_validate(values).every == 20


def test_every_below_one_is_refused_with_the_key_and_the_remedy() -> None:
    values = config().model_dump() | {"every": 0}
    with pytest.raises(ValueError, match=r"observe\.every=0 must be at least 1 step; use"):
        ObserveConfig.model_validate(values)


def test_a_report_is_one_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.report(20, 1280, {"train/loss": 1.5})
    assert lines_of(tmp_path) == [{"step": 20, "images_seen": 1280, "train/loss": 1.5}]
    log.report(20, 1280, {"upstream/val/top1": 0.25})
    assert lines_of(tmp_path)[1] == {"step": 20, "images_seen": 1280, "upstream/val/top1": 0.25}


def test_values_that_are_not_finite_are_null_in_strict_json(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.report(1, 2, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close("done", failed=False)
    assert lines_of(tmp_path) == [{"step": 1, "images_seen": 2, "a": None, "b": None, "c": 1.0}]
    assert summary_of(tmp_path)["metrics"] == {"a": None, "b": None, "c": 1.0}


def test_a_metric_may_not_take_the_name_of_the_axis(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        open_log(tmp_path).report(1, 2, {"step": 3.0})


def test_a_resume_cuts_later_lines_and_a_torn_last_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (20, 40, 60):
        log.report(step, step * 64, {"train/loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "images_se')
    log = open_log(tmp_path, resume_step=40)
    assert [line["step"] for line in lines_of(tmp_path)] == [20, 40]
    log.report(60, 60 * 64, {"train/loss": 0.5})
    assert [line["step"] for line in lines_of(tmp_path)] == [20, 40, 60]


def test_a_torn_last_line_is_cut_when_no_later_step_was_written(tmp_path: Path) -> None:
    open_log(tmp_path).report(20, 1280, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40')
    open_log(tmp_path, resume_step=20).report(40, 2560, {"train/loss": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [20, 40]


def test_a_start_from_scratch_leaves_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    open_log(tmp_path).report(0, 0, {"train/loss": 1.0})
    open_log(tmp_path).report(0, 0, {"train/loss": 1.0})
    assert len(lines_of(tmp_path)) == 1


def test_a_resume_leaves_an_untouched_file_untouched(tmp_path: Path) -> None:
    open_log(tmp_path).report(20, 1280, {"train/loss": 0.1 + 0.2})
    before = (tmp_path / "metrics.jsonl").stat()
    open_log(tmp_path, resume_step=20)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_the_summary_holds_the_last_value_of_every_metric_and_the_reason(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.report(20, 1280, {"train/loss": 2.0, "upstream/val/top1": 0.5})
    log.report(40, 2560, {"train/loss": 1.0})
    log.ended("hang")  # by what cannot wait for the rest to close
    assert summary_of(tmp_path)["ended"] == "hang"
    log.close("finished", failed=False)
    summary = summary_of(tmp_path)
    assert summary["metrics"] == {"train/loss": 1.0, "upstream/val/top1": 0.5}
    assert (summary["steps"], summary["images_seen"], summary["ended"]) == (40, 2560, "finished")


def test_a_run_that_is_killed_keeps_its_wall_time_and_has_no_end(tmp_path: Path) -> None:
    program = f"""
        import os, time, signal
        from pathlib import Path
        from tests.unit.observe.test_log import open_log
        log = open_log(Path({str(tmp_path)!r}))
        time.sleep(0.3)
        log.report(20, 1280, {{"train/loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    killed = summary_of(tmp_path)
    assert killed["ended"] is None
    assert killed["wall_seconds"] >= 0.3
    log = open_log(tmp_path, resume_step=20)
    log.close("finished", failed=False)
    assert summary_of(tmp_path)["wall_seconds"] >= killed["wall_seconds"]


def test_the_summary_after_a_resume_forgets_what_was_cut(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.report(20, 1280, {"train/loss": 2.0})
    log.report(40, 2560, {"train/loss": 1.0, "upstream/val/top1": 0.5})
    open_log(tmp_path, resume_step=20).close("stopped", failed=False)
    assert summary_of(tmp_path)["metrics"] == {"train/loss": 2.0}
    assert summary_of(tmp_path)["steps"] == 20


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path / "run", main=False, wandb_id="abc")
    log.report(20, 1280, {"train/loss": 1.0})
    log.message("hello")
    log.warn("careful")
    log.close("finished", failed=False)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
    assert not isinstance(log, RunLog)
    assert log.wandb_id == "abc"


def test_the_wandb_id_is_made_once_and_outlives_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    first = open_log(tmp_path / "a")
    assert len(first.wandb_id) == 16
    assert open_log(tmp_path / "a").wandb_id == first.wandb_id
    assert open_log(tmp_path / "b").wandb_id != first.wandb_id
    assert open_log(tmp_path / "a", wandb_id="given").wandb_id == "given"


def test_away_from_a_terminal_a_report_is_one_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.report(20, 1280, {"train/loss": 1.234, "router/3/entropy": 1.0, "perf/images_per_second": 1234.4})
    log.report(40, 2560, {"train/loss": 0.5, "perf/images_per_second": 99.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step  20/660  loss 1.2340   1,234 images/s  eta 0:")
    assert second.startswith("step  40/660  loss 0.5000      99 images/s  eta 0:")


def test_at_progress_off_only_warnings_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = build_log(
        config(progress="off"),
        tmp_path,
        name="r",
        run_config={},
        total_steps=9,
        main=True,
        wandb_id=None,
        resume_step=0,
    )
    log.report(1, 1, {"train/loss": 1.0})
    log.message("hello")
    log.warn("careful")
    log.close("finished", failed=False)
    assert capsys.readouterr().out == "warning: careful\n"


def test_on_a_terminal_every_line_stands_whole_above_one_bar(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from tests.unit.observe.test_log import config
        from softmoe_train.observe.log import build_log
        log = build_log(config(progress="auto"), Path({str(tmp_path)!r}), name="r", run_config={{}}, total_steps=100,
                        main=True, wandb_id=None, resume_step=0)
        for step in range(10, 101, 10):
            log.report(step, step, {{"train/loss": step / 8, "perf/images_per_second": 10.0}})
            print("a print of the user")
        log.message("the [bold]end[/bold]")
        log.close("finished", failed=False)
    """
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    sent = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # Linux says so when the last writer closes
            break
        if not piece:
            break
        sent += piece
    os.close(leader)
    assert worker.wait() == 0
    screen = screen_of(sent.decode())
    reports = [line for line in screen if line.startswith("step ")]
    assert [line.split()[1] for line in reports] == [f"{step}/100" for step in range(10, 101, 10)]
    assert all(re.fullmatch(r"step +\d+/100  loss \d+\.\d+ +10 images/s  eta 0:\d\d:\d\d", line) for line in reports)
    assert screen.count("a print of the user") == 10
    assert "the [bold]end[/bold]" in screen
    bars = [line for line in screen if "━" in line]
    assert len(bars) == 1
    assert "100/100" in bars[0]
    assert "loss 12.5000" in bars[0]
    assert bars == screen[-1:]
    assert sent.decode().rfind("\x1b[?25h") > sent.decode().rfind("\x1b[?25l")  # the cursor is visible again


def screen_of(sent: str) -> list[str]:
    """What a terminal shows after `sent`: the few movements that rich uses, all others refused."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(sent):
        char = sent[at]
        if char == "\x1b":
            end = next(i for i in range(at + 2, len(sent)) if sent[i].isalpha())
            argument, verb = sent[at + 2 : end], sent[end]
            if verb == "A":
                row -= int(argument or 1)
            elif verb == "K":
                assert argument == "2"
                lines[row] = ""
            else:
                assert verb in "mhl", sent[at : end + 1]
            at = end + 1
            continue
        if char == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif char == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
        at += 1
    return [line.rstrip() for line in lines if line.strip()]
