"""This file owns `softmoe eval`: any evaluator, on any checkpoint."""

import sys

import rich.box
import rich.console
import rich.table

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.commands.workers import Verb, run_verb
from softmoe_train.config import ConfigError, compose_own, split_overrides
from softmoe_train.dist import World
from softmoe_train.evaluate import EvalConfig, Measured, as_ckpt, evaluate, measured, write_json
from softmoe_train.launching.local import TOLD_CODES
from softmoe_train.settings import RunConfig

FAILED = 1


def eval_checkpoint(overrides: list[str]) -> int:
    """Measure and print; returns 1 where the checkpoint is damaged. Raises ConfigError before anything is started."""
    verb = Verb(
        "eval",
        compose=lambda world: _compose(overrides, world),
        work=_measure,
        interrupted=lambda _: "interrupted, nothing was measured",
        told=(FAILED, *TOLD_CODES),
    )
    return run_verb(verb, overrides)


def _compose(overrides: list[str], world: World | None) -> Measured:
    """All mistakes at once, in the keys of the measurement and in those of the run."""
    ours, others = split_overrides(EvalConfig, RunConfig, overrides)
    own, problems = compose_own(EvalConfig, "eval.yaml", ours)
    if own is None:
        raise ConfigError(problems)
    try:
        asked = measured(own, others, *((world.size, world.local_size) if world else (None, None)))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return asked


def _measure(asked: Measured, world: World) -> int:
    try:
        values = evaluate(asked, world)
    except CheckpointError as error:
        if world.main:  # the same on every rank
            print(f"softmoe eval: {as_ckpt(str(error))}", file=sys.stderr, flush=True)
        return FAILED
    if world.main:
        if asked.own.out is not None:  # first: whoever reads the table may close the pipe
            write_json(asked.own.out, asked, values)
        table = rich.table.Table("measure", "value", title=asked.what, box=rich.box.SIMPLE, title_justify="left")
        for name, value in values.items():
            table.add_row(name, f"{value:.4f}")
        rich.console.Console(soft_wrap=True).print(table)
    return 0
