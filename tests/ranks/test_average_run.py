"""A whole run with averaged weights: the same numbers, both measured, and averaging switched on or off under a run."""

from pathlib import Path

import pytest

from softmoe_train.config import ConfigError
from tests.runs import metrics, run_here, stored

QUIET = ["recipe=debug", "steps=4", "schedule.warmup_steps=1", "observe.every=1", "evals.upstream.every=2"]
QUIET += ["observe.wandb.mode=disabled", "observe.progress=plain", "checkpoint.every=2", "optim=adafactor"]


def go(run: Path, *overrides: str) -> Path:
    return run_here(run, *QUIET, *overrides)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("plain"))


def test_a_run_with_averaging_has_the_losses_of_one_without(plain: Path, tmp_path: Path) -> None:
    averaged = go(tmp_path, "average=ema", "average.decay=0.5")
    for name in ("train/loss", "train/grad_norm", "upstream/test/loss"):
        assert metrics(averaged, name) == metrics(plain, name)
    assert sorted(metrics(averaged, "upstream_average/test/top1")) == [2, 4]
    assert metrics(averaged, "upstream_average/test/loss")[4] != metrics(averaged, "upstream/test/loss")[4]
    assert metrics(plain, "upstream_average/test/loss") == {}


def test_averaging_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    how = ["average=ema", "average.decay=0.5", "average.warmup=true"]
    whole = go(tmp_path / "whole", *how)
    go(tmp_path / "halves", *how, "stop_after=2")
    halves = go(tmp_path / "halves", *how)
    assert metrics(halves, "upstream_average/test/loss") == metrics(whole, "upstream_average/test/loss")
    one, two = stored(whole, 4), stored(halves, 4)
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_averaging_may_begin_and_end_under_a_run_that_allows_changes(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ema = tmp_path / "changing", ["average=ema", "average.decay=0.5"]
    go(run, "stop_after=2")
    with pytest.raises(ConfigError, match=r"average\.decay=0\.5 \(was None\).*allow_changes=true"):
        go(run, *ema)
    go(run, *ema, "allow_changes=true", "stop_after=3")
    assert "; the average of the weights starts here; changed: average.decay=" in capsys.readouterr().out
    assert any(":average.head.weight" in name for name in stored(run, 3))
    go(run, "allow_changes=true")
    assert "; without its averaged weights; changed: average.decay=" in capsys.readouterr().out
    assert not any(":average." in name for name in stored(run, 4))
    assert metrics(run, "train/loss") == metrics(plain, "train/loss")
