"""A sweeper of Hydra's is handed our way to run points, and chooses the same ones in every start."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.config import ConfigError
from softmoe_train.sweep.plugins import PointFailedError, search
from softmoe_train.sweep.points import Kind
from softmoe_train.sweep.search import run_search

WORDS = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=3", "hydra.sweeper.direction=minimize"]  # fmt: skip
LINE = ["recipe=debug", "schedule.peak=interval(0.001,0.01)", "model.moe.slots_per_expert=1,2"]

needs_optuna = pytest.mark.skipif(
    find_spec("optuna") is None or find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed",
)


def peak(line: list[str]) -> float:
    return float(next(word for word in line if word.startswith("schedule.peak=")).partition("=")[2])


@needs_optuna
def test_the_same_search_chooses_the_same_points_and_learns_from_their_values(tmp_path: Path) -> None:
    found: list[list[list[str]]] = [[], []]
    for lines in found:

        def values(batch: list[list[str]], lines: list[list[str]] = lines) -> list[float | None]:
            assert len(batch) == 2
            lines += batch
            return [abs(peak(line) - 0.004) for line in batch]

        search(WORDS, tmp_path, LINE, values)
    assert found[0] == found[1] and len(found[0]) == 6
    assert all("recipe=debug" in line and 0.001 <= peak(line) <= 0.01 for line in found[0])
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(abs(peak(line) - 0.004) for line in found[0])


@needs_optuna
def test_a_search_ends_where_more_points_fail_than_it_bears(tmp_path: Path) -> None:
    with pytest.raises(PointFailedError):
        search(WORDS, tmp_path, LINE, lambda batch: [None, 0.5])
    search([*WORDS, "hydra.sweeper.max_failure_rate=0.5"], tmp_path, LINE, lambda batch: [None, 0.5])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra.sweeper.storage=sqlite:///study.db"], "hydra.sweeper.storage=sqlite:///study.db: what is complete is in the folders"),
        (["hydra.sweeper.custom_search_space=os.system"], "a path of Python is not run"),
        (["hydra.sweep.dir=elsewhere"], "the folder of a sweep is run_dir="),
    ],
)  # fmt: skip
@needs_optuna
def test_what_a_search_decides_itself_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_search(
            Kind("train", compose_train, check_train), ["hydra/sweeper=optuna", *words, "recipe=debug", "seed=1"]
        )
    assert any(told in problem for problem in error.value.problems)
    assert any("no override leaves a choice" in problem for problem in error.value.problems)
