"""Alarms: a planted collapse raises them, a healthy run does not, and nothing is said twice."""

import re
from pathlib import Path

import pytest

from softmoe_train.config import compose, config_folder, load_yaml
from softmoe_train.dist import World
from softmoe_train.evals.alarms import Alarms, AlarmsConfig
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.runs import metrics

QUIET = [
    "recipe=debug",
    "observe.wandb.mode=disabled",
    "observe.progress=plain",
    "evals=[routing]",
    "checkpoint.every=0",
]
# Without normalisation logits grow with the width: at 512 a few updates at this rate make both softmaxes one-hot.
PLANTED = ["model.moe.soft.normalize=false", "schedule.peak=0.1", "schedule.warmup_steps=1", "model.width=512"]


def warnings_of(run: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    config = compose(RunConfig, [*QUIET, f"run_dir={run}", *overrides], lambda config: check(config, 1, 1))
    train(config, World(rank=0, size=1, local_rank=0, local_size=1))
    return re.findall(r"^warning: (.*)$", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_planted_collapse_raises_the_alarm_and_a_healthy_run_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = ["steps=12", "evals.routing.every=4"]
    assert warnings_of(tmp_path / "healthy", capsys, *often) == []
    assert max(metrics(tmp_path / "healthy", "router/1/dispatch_max").values()) < 0.5
    said = warnings_of(tmp_path / "planted", capsys, *often, *PLANTED)
    told = {text.partition(": ")[0]: text for text in said}
    assert len(told) == len(said), "each kind once"
    where = r"step \d+: in block 1 \d+% of the tokens read one slot alone, .*lower schedule\.peak"
    assert re.search(where, told["combine has collapsed"]), said
    assert metrics(tmp_path / "planted", "router/1/one_hot_tokens")[12] > 0.9


def alarms() -> Alarms:
    return Alarms(AlarmsConfig(**load_yaml(config_folder() / "evals" / "routing.yaml")["routing"]["alarms"]))


def titles(watch: Alarms, step: int, *values: float, measure: str = "one_hot_slots") -> list[str]:
    return [alarm.text for _, alarm in watch.see(step, {block: {measure: value} for block, value in enumerate(values)})]


def test_an_alarm_names_all_blocks_once_and_comes_again_only_after_they_were_well() -> None:
    watch = alarms()
    (text,) = titles(watch, 10, 0.95, 0.2, 0.99)
    assert text.startswith("step 10: in blocks 0, 2 99% of the slots read one token alone")
    assert titles(watch, 20, 0.95, 0.2, 0.99) == titles(watch, 30, 0.88, 0.2, 0.95) == []
    assert titles(watch, 40, 0.95, 0.92, 0.95) == [alarms_text(40, "in block 1 92%")]
    assert titles(watch, 50, 0.5, 0.92, 0.95) == []
    assert titles(watch, 60, 0.95, 0.92, 0.95) == [alarms_text(60, "in block 0 95%")]
    assert len(titles(alarms(), 60, 0.95, 0.92, 0.95)) == 1  # a resumed run: all that is so, in one


def alarms_text(step: int, where: str) -> str:
    (text,) = titles(alarms(), step, 0.95)
    return text.replace("in block 0 95%", where)


def test_a_uniform_router_is_told_of_only_late_and_a_scale_of_either_sign() -> None:
    uniform = {0: {"uniform_slots": 1.0, "uniform_tokens": 1.0}, 1: {"uniform_slots": 1.0, "uniform_tokens": 0.5}}
    watch = alarms()
    assert list(watch.see(19_999, uniform)) == []
    (said,) = watch.see(20_000, uniform)
    assert said[1].title == "the router has learned nothing" and "in block 0 " in said[1].text
    assert len(titles(alarms(), 1, -70.0, measure="scale")) == 1
    assert titles(alarms(), 1, float("nan"), measure="scale") == []
