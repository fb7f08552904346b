"""summary.json tells how each process of a run ended, whatever the next one finds of it."""

import json
from pathlib import Path

import pytest

from softmoe_train.observe.history import KEPT, History, next_start
from softmoe_train.observe.log import RunLog
from softmoe_train.observe.run_files import Summary
from tests.unit.observe.test_log import open_log, summary_of


def history_of(run_dir: Path) -> dict:
    return summary_of(run_dir)["history"]


def ends_of(run_dir: Path) -> list[tuple]:
    return [(p["from_step"], p["to_step"], p["ended"]) for p in history_of(run_dir)["processes"]]


def test_every_end_is_told_with_its_step_and_counted_by_its_kind(tmp_path: Path) -> None:
    for start, end, reason in [
        (0, 120, "interrupted by SIGTERM"), (120, 150, None), (140, 145, "failed: OSError: disk 1"),
        (140, 146, "failed: OSError: disk 2"), (140, 200, "stopped"), (200, 300, "complete"), (300, 400, "complete"),
    ]:  # fmt: skip
        log = open_log(tmp_path, resume_step=start)
        log.report(end, 64 * end, {"train/loss": 1.0})
        if reason is not None:
            log.close(reason, failed=reason.startswith("failed"))
    history = history_of(tmp_path)
    assert history["starts"] == 7
    assert history["interruptions"] == {"interrupted by SIGTERM": 1, "killed": 1, "failed": 2, "stopped": 1}
    assert history["lost_steps"] == (150 - 140) + (145 - 140) + (146 - 140)
    assert ends_of(tmp_path) == [
        (0, 120, "interrupted by SIGTERM"), (120, 150, "killed"), (140, 145, "failed: OSError: disk 1"),
        (140, 146, "failed: OSError: disk 2"), (140, 200, "stopped"), (200, 300, "complete"), (300, 400, "complete"),
    ]  # fmt: skip


def test_two_starts_before_the_first_report_are_two_starts(tmp_path: Path) -> None:
    for _ in range(3):
        open_log(tmp_path)
    assert ends_of(tmp_path) == [(0, 0, "killed"), (0, 0, "killed"), (0, 0, None)]
    assert history_of(tmp_path)["interruptions"] == {"killed": 2}
    assert history_of(tmp_path)["lost_steps"] == 0


def test_what_a_process_records_is_on_disk_at_once_and_stays_in_its_entry(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.record("resumed", "resumed from somewhere", {"step": 3})
    log.record("startup", "it took long", {"imports": 1.5})
    assert history_of(tmp_path)["processes"][0]["facts"] == {"resumed": {"step": 3}, "startup": {"imports": 1.5}}
    open_log(tmp_path)
    assert [list(p["facts"]) for p in history_of(tmp_path)["processes"]] == [["resumed", "startup"], []]


@pytest.mark.parametrize("content", ["", '{"wall_sec', "[]", '{"wall_seconds": 1.0, "wandb_id": "a", "history": [1]}'])
def test_a_summary_that_cannot_be_read_is_told_and_the_history_starts_anew(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(content)
    open_log(tmp_path, resume_step=40)
    assert "warning: summary.json cannot be read" in capsys.readouterr().out
    assert ends_of(tmp_path) == [(40, 40, None)]
    assert history_of(tmp_path)["starts"] == 1


def test_what_is_added_to_a_run_that_has_ended_is_no_start_of_it(tmp_path: Path) -> None:
    first = Summary(tmp_path / "summary.json", 0)
    first.write({"step": 7}, 1.0, wandb_id="a", ended="complete")
    late = Summary(tmp_path / "summary.json", 7, amends=True)
    late.write({"step": 7, "finetune/pets/top1": 0.5}, 1.0, wandb_id="a", ended="complete")
    history = json.loads((tmp_path / "summary.json").read_text())["history"]
    assert (history["starts"], len(history["processes"]), history["interruptions"]) == (1, 1, {})


@pytest.mark.parametrize("content", [None, '{"wall_seconds": 7.5, "wandb_id": "a", "ended": null}'])
def test_without_a_history_it_begins_without_a_word(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    log = open_log(tmp_path, resume_step=40)
    assert capsys.readouterr().out == ""
    assert history_of(tmp_path)["starts"] == 1
    assert isinstance(log, RunLog)
    assert (log.wandb_id == "a") == (content is not None)


def test_after_five_thousand_preemptions_counts_are_whole_and_the_list_is_short() -> None:
    history: History | None = None
    for start in range(5000):
        history = next_start(history, from_step=10 * start).reached(10 * start + 12).ended("interrupted by SIGTERM")
    assert history is not None
    assert history.starts == history.interruptions["interrupted by SIGTERM"] == 5000
    assert history.lost_steps == 2 * 4999
    assert [p.from_step for p in history.processes] == list(range(10 * (5000 - KEPT), 50000, 10))
    assert len(history.model_dump_json()) < 200 * KEPT


def test_an_error_of_many_pages_does_not_fill_the_summary(tmp_path: Path) -> None:
    open_log(tmp_path).close("failed: ValueError: " + "x" * 10**6, failed=True)
    open_log(tmp_path)
    assert len((tmp_path / "summary.json").read_text()) < 2000
    assert history_of(tmp_path)["interruptions"] == {"failed": 1}
