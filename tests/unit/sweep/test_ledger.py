"""The ledger of a sweep: whole lines on the disk, one process at a time, and which attempts count as failures."""

import json
import os
import resource
from pathlib import Path

import pytest

from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.ledger import FILE, Ledger, open_ledger
from softmoe_train.sweep.points import Point
from tests.runs import ending
from tests.unit.sweep.holding import held_by_another


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(RunConfig, ["recipe=debug", "data.streams=8"], lambda _: [])


def point(config: RunConfig, folder: Path, **changes: object) -> Point:
    run = config.model_copy(update={"run_dir": str(folder / "seed=1"), **changes})
    return Point(
        "seed=1", ["seed=1", "data.train=https://me:secret@far/a.tar?X-Amz-Signature=abc"], {"seed": "1"}, {}, run
    )


def test_a_torn_or_foreign_line_is_passed_over_and_spoils_no_other(config: RunConfig, tmp_path: Path) -> None:
    one = point(config, tmp_path)
    with open_ledger(tmp_path) as ledger:
        ledger.plan(one), ledger.plan(one)
        assert ledger.start(one, pid=7) == 1
    with (tmp_path / FILE).open("a") as file:
        file.write('[]\n{"event": 3, "label": "seed=1"}\n{"event": "ended", "lab')
    with open_ledger(tmp_path) as ledger:
        assert ledger.broken == 3
        assert ledger.start(one, pid=8) == 2
        ledger.end(one, "complete", code=0, reason="complete", step=20)
    after = Ledger(tmp_path / FILE)
    assert [entry["event"] for entry in after.entries] == ["planned", "started", "started", "ended"]
    assert (
        after.broken == 3
        and "secret" not in (tmp_path / FILE).read_text()
        and "abc" not in (tmp_path / FILE).read_text()
    )


def test_every_line_is_on_the_disk_when_the_call_returns(config: RunConfig, tmp_path: Path) -> None:
    def works() -> None:
        with open_ledger(tmp_path) as ledger:
            ledger.start(point(config, tmp_path))
            os.kill(os.getpid(), 9)

    assert ending(works)[0] == -9
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line)["event"] == "started"


def test_a_line_that_the_disk_took_in_part_is_told_and_spoils_no_other(config: RunConfig, tmp_path: Path) -> None:
    one = point(config, tmp_path)
    with open_ledger(tmp_path) as ledger:
        ledger.start(one, pid=7)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size + 20, before[1]))
        try:
            with pytest.raises(OSError, match="only a part of a line"):
                ledger.end(one, "complete", code=0, reason="complete", step=20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        ledger.end(one, "failed", code=1, reason="", step=0)
    after = Ledger(tmp_path / FILE)
    assert after.entries == ledger.entries and [entry.get("state") for entry in after.entries] == [None, "failed"]
    assert after.broken == 1


def test_a_second_process_is_refused_and_told_who_has_the_sweep(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as pid, pytest.raises(ConfigError, match=f"under way: .* process {pid} on "):
        open_ledger(tmp_path).__enter__()
    with open_ledger(tmp_path):
        pass


def test_only_failures_with_the_present_settings_count(config: RunConfig, tmp_path: Path) -> None:
    one, other = point(config, tmp_path), point(config, tmp_path, micro_batches=2)
    with open_ledger(tmp_path) as ledger:
        for state, code in (("failed", 1), ("interrupted", 75), ("failed", 137), ("stopped", 0)):
            ledger.end(one, state, code=code, reason="", step=0)
        ledger.start(one)  # cut off with its sweep
        assert [entry["code"] for entry in ledger.failures(one)] == [1, 137]
        assert ledger.failures(other) == []


def test_neither_name_nor_place_is_a_setting_that_tells_points_apart(config: RunConfig, tmp_path: Path) -> None:
    one, other = point(config, tmp_path), point(config, tmp_path / "there", name="other")
    assert one.digest == other.digest != point(config, tmp_path, seed=9).digest
