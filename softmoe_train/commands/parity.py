"""This file owns `softmoe parity`: a run's own settings, without its data, to a proof and an exit code."""

from softmoe_train.asked import dense_problems
from softmoe_train.commands.workers import Verb, ranks, run_verb
from softmoe_train.config import ConfigError, compose, compose_own, split_overrides
from softmoe_train.dist import World
from softmoe_train.launching.local import TOLD_CODES
from softmoe_train.parity.session import ParityConfig, ParityRun, parity_problems, parity_rank
from softmoe_train.settings import RunConfig

FAILED = 1


def parity(overrides: list[str]) -> int:
    """Prove the layout; returns 0 where it holds and 1 where it does not. Raises ConfigError before anything is started."""
    verb = Verb(
        "parity",
        compose=lambda world: _compose(overrides, world),
        work=lambda asked, world: 0 if parity_rank(asked, world) else FAILED,
        interrupted=lambda _: "interrupted, nothing was proven",
        told=(FAILED, *TOLD_CODES),
    )
    return run_verb(verb, overrides)


def _compose(overrides: list[str], world: World | None) -> ParityRun:
    """All mistakes at once, in the keys of the proof and in those of the run."""
    ours, others = split_overrides(ParityConfig, RunConfig, overrides)
    own, problems = compose_own(ParityConfig, "parity.yaml", ours)
    try:
        run = compose(
            RunConfig, others, lambda c: parity_problems(c, *ranks(world, c)) + dense_problems(c.model, others)
        )
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems or own is None:
        raise ConfigError(problems)
    return ParityRun(run, own)
