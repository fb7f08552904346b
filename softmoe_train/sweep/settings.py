"""This file owns the keys that a sweep has beside those of its runs, and which of Hydra's own it takes."""

from typing import Annotated, NamedTuple

from pydantic import Field, field_validator

from softmoe_train.checkpoint.best import RULE
from softmoe_train.config import HYDRA, Record, compose_own
from softmoe_train.finetune import key_of
from softmoe_train.sweep.plugins import plugin_problems

PREFIX = "sweep."
BASIC = "basic"  # the grid, on this machine
MOST_SLOTS = 1_000_000  # of an image
Positive = Annotated[int, Field(ge=1)]


class SweepConfig(Record):
    """How a sweep goes about its points."""

    fixed_slots: bool | Annotated[int, Field(ge=1, le=MOST_SLOTS)]
    couple: dict[str, str]
    processes: Positive | None
    retries: Annotated[int, Field(ge=0)]
    measure: str | None
    cost: bool
    only_cost: bool

    @field_validator("measure")
    @classmethod
    def _a_rule(cls, measure: str | None) -> str | None:
        if measure is not None and not RULE.fullmatch(measure):
            raise ValueError(
                f"sweep.measure={measure}: write highest or lowest and the metric, as in "
                f'"sweep.measure=highest upstream/test/top1"'
            )
        return measure


class Words(NamedTuple):
    """What was asked for on the line, apart: of the sweep, of Hydra, of the runs."""

    sweep: list[str]
    hydra: list[str]
    runs: list[str]

    @property
    def launcher(self) -> str:
        """Who starts the points."""
        return self._chosen("hydra/launcher", BASIC)

    @property
    def sweeper(self) -> str:
        """Who says which points there are."""
        return self._chosen("hydra/sweeper", BASIC)

    def _chosen(self, key: str, otherwise: str) -> str:
        return next((o.partition("=")[2] for o in reversed(self.hydra) if key_of(o) == key), otherwise)


def words_of(overrides: list[str]) -> Words:
    """The overrides of a line by whom they are for."""
    sweep = [o for o in overrides if key_of(o).startswith(PREFIX) or key_of(o) == PREFIX[:-1]]
    hydra = [o for o in overrides if HYDRA.match(o)]
    return Words(sweep, hydra, [o for o in overrides if o not in sweep and o not in hydra])


def compose_sweep(words: Words) -> tuple[SweepConfig | None, list[str]]:
    """The settings of a sweep, and all that is wrong with them."""
    settings, problems = compose_own(SweepConfig, "sweep.yaml", [o.removeprefix(PREFIX) for o in words.sweep])
    problems = [problem if problem.startswith(PREFIX) else f"{PREFIX}{problem}" for problem in problems]
    return settings, problems + _hydra_problems(words)


def _hydra_problems(words: Words) -> list[str]:
    problems = plugin_problems(words.launcher, words.sweeper)
    theirs = ("launcher",) * (words.launcher != BASIC) + ("sweeper",) * (words.sweeper != BASIC)
    taken = tuple(f"hydra{sign}{one}{sign}" for sign in "./" for one in theirs)
    for override in words.hydra:
        key = key_of(override)
        if key in ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.launcher.submitit_folder"):
            problems.append(f"{override}: the folder of a sweep is run_dir=, and each point has one of its own in it")
        elif key not in ("hydra/launcher", "hydra/sweeper") and not key.startswith(taken):
            problems.append(f"{override}: {_of_whom(key)} leave it out")
    return problems


def _of_whom(key: str) -> str:
    """Why an override of Hydra's does nothing."""
    if key.startswith(("hydra.launcher", "hydra/launcher")):
        return "it belongs to hydra/launcher=submitit_slurm, which is not there: add that, or"
    if key.startswith(("hydra.sweeper", "hydra/sweeper")):
        return "it belongs to hydra/sweeper=optuna, which is not there: add that, or"
    return "Hydra's own settings do nothing here;"
