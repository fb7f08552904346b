"""What `softmoe finetune -m` leaves alone until its sweep has begun."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from softmoe_train.commands import finetune
from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig
from softmoe_train.sweep import drive
from softmoe_train.sweep.ledger import Ledger
from softmoe_train.sweep.outcome import Outcome
from softmoe_train.sweep.points import Kind, Point
from softmoe_train.sweep.settings import Words, compose_sweep
from tests.unit.sweep.holding import held_by_another


class Nothing(NamedTuple):
    """Starts no point."""

    def run(self, points: Sequence[Point], ledger: Ledger) -> list[Outcome]:
        return [Outcome(point, "to do", None, "") for point in points]


def test_the_account_of_a_point_goes_when_its_sweep_has_begun_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while only the cost is asked for, nor while another process has the sweep."""
    config = compose(RunConfig, ["recipe=debug", f"run_dir={tmp_path}/seed=1"], lambda _: [])
    point = Point("seed=1", [], {"seed": "1"}, {}, config)
    account = point.folder / "test.json"
    account.parent.mkdir()
    account.write_text("{}")
    only_cost = ["sweep.only_cost=true"]

    def made(kind: Kind, overrides: list[str]) -> drive.Sweep:
        words = Words(overrides, [], [])
        settings, _ = compose_sweep(words)
        assert settings is not None
        return drive.Sweep(kind, settings, words, [point], "highest finetune/val/top1")

    monkeypatch.setattr(finetune, "make_sweep", made)
    monkeypatch.setattr(drive, "build_launcher", lambda _: Nothing())
    monkeypatch.setattr(drive, "print_costs", lambda *_: None)
    monkeypatch.setattr(drive, "costs_of", lambda *_: [])
    assert finetune.choose(only_cost) == 0 and account.exists()
    with held_by_another(tmp_path), pytest.raises(ConfigError, match="under way"):
        finetune.choose([])
    assert account.exists()
    assert finetune.choose([]) == 75 and not account.exists()
