"""What a person is told who forgot the launcher, forgot -m, left a save too little time, or changed their mind."""

import signal

import pytest

from softmoe_train.commands import main as command_line
from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.drive import make_sweep
from softmoe_train.sweep.points import Kind
from softmoe_train.sweep.settings import compose_sweep, words_of

TRAIN = Kind("train", compose_train, check_train)


def test_settings_of_a_launcher_that_was_forgotten_are_refused_with_its_name() -> None:
    _, problems = compose_sweep(words_of(["hydra.launcher.nodes=2", "hydra.sweeper.n_trials=3", "hydra.verbose=true"]))
    assert ["submitit_slurm" in problem for problem in problems] == [True, False, False]
    assert ["optuna" in problem for problem in problems] == [False, True, False]


def test_several_values_without_m_are_told_to_be_a_sweep() -> None:
    with pytest.raises(ConfigError, match=r"model.moe.num_experts=2,4: several values are a sweep, `softmoe train -m"):
        compose(RunConfig, ["recipe=debug", "model.moe.num_experts=2,4"], lambda _: [])


def test_a_job_has_the_time_to_save_before_its_limit() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    line = ["hydra/launcher=submitit_slurm", "recipe=debug", "seed=1,2"]
    assert len(make_sweep(TRAIN, line).points) == 2
    with pytest.raises(ConfigError, match=r"signal_delay_s=120: .* give 125 or more"):
        make_sweep(TRAIN, [*line, "hydra.launcher.signal_delay_s=120"])


def test_ctrl_c_before_anything_has_started_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(overrides: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "sweep", interrupted)
    assert command_line.main(["train", "-m", "recipe=debug", "seed=1,2"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "softmoe train: interrupted\n"
