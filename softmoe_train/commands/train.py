"""This file owns `softmoe train`: one worker under a launcher, or the launcher of local workers."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from softmoe_train.asked import dense_problems, unread
from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.folder import step_folders, step_of
from softmoe_train.commands.elastic import check_train, in_legal_world
from softmoe_train.commands.workers import Verb, as_worker, run_verb, under_a_launcher
from softmoe_train.config import as_yaml, compose
from softmoe_train.data import ShardsError, UselessShardsError
from softmoe_train.dist import World
from softmoe_train.faults.bad_steps import BadStepsError
from softmoe_train.faults.broken import TooManyBrokenError
from softmoe_train.faults.stop import TIME_IS_UP
from softmoe_train.launching.local import TOLD_CODES
from softmoe_train.launching.meeting import End
from softmoe_train.launching.worker import RESUME, launcher_of
from softmoe_train.observe.startup import Startup
from softmoe_train.report.closing import closing_lines
from softmoe_train.run import train as train_rank
from softmoe_train.settings import RunConfig

Composing = Callable[[list[str], Callable[[RunConfig], list[str]]], RunConfig]
EXIT_SECONDS = 5  # what a worker that gives up its save may need to be gone


class Asked(NamedTuple):
    """What was asked of a verb that trains: its name, how it composes, the overrides."""

    verb: str
    compose: Composing
    overrides: list[str]


def train(overrides: list[str], *, print_only: bool) -> int:
    """Compose and check the configuration, then train with it; raises ConfigError before anything is started."""
    return run_training("train", compose_train, overrides, print_only=print_only)


def run_training(name: str, composed: Composing, overrides: list[str], *, print_only: bool) -> int:
    """The verb `name` that trains the run which `composed` makes of the overrides and a check; raises ConfigError before anything is started."""
    if print_only:
        if under_a_launcher():
            return as_worker(name, lambda world: _print(composed, overrides) if world.main else 0)
        return _print(composed, overrides)
    startup = Startup(launcher_of(os.environ))
    startup.done("imports")
    asked = Asked(name, composed, overrides)
    verb = Verb(
        name,
        compose=lambda world: composed(overrides, lambda c: check_train(c, world)),
        work=lambda config, world: in_legal_world(config, world, lambda legal: _train(config, asked, legal, startup)),
        interrupted=_interrupted,
        grace_seconds=lambda config: config.checkpoint.grace + EXIT_SECONDS,
    )
    return run_verb(verb, overrides)


def compose_train(overrides: list[str], check: Callable[[RunConfig], list[str]]) -> RunConfig:
    """The run that `softmoe train` with these overrides is; raises ConfigError with every mistake."""
    return compose(RunConfig, overrides, lambda c: check(c) + dense_problems(c.model, overrides))


def _interrupted(config: RunConfig) -> str:
    """What an interruption cost, and how to go on."""
    try:
        complete = step_folders(config.checkpoints, complete=True)
    except OSError as error:
        return f"interrupted; the same command goes on from the last checkpoint of {config.folder} ({error})"
    if not complete:
        return f"interrupted before the first checkpoint of {config.folder}; the same command starts over"
    return f"interrupted; the same command goes on from step {step_of(complete[-1])} of {config.folder}"


def _train(config: RunConfig, asked: Asked, world: World, startup: Startup) -> End:
    startup.done("settings")
    for told in unread(config.model, asked.overrides) if world.main else ():
        print(f"softmoe {asked.verb}: {told}", file=sys.stderr, flush=True)
    try:
        reason = train_rank(config, world, startup)
    except (CheckpointError, BadStepsError, TooManyBrokenError) as error:
        if world.main:  # these are the same on every rank, and say all there is to say
            print(f"softmoe {asked.verb}: {error}", file=sys.stderr, flush=True)
        return End(TOLD_CODES[1], for_good=True)
    except (ShardsError, UselessShardsError) as error:
        if world.size > 1:  # others wait for this rank, and end by what its launcher sees
            raise
        print(f"softmoe {asked.verb}: {error}", file=sys.stderr, flush=True)
        return End(TOLD_CODES[1], for_good=isinstance(error, UselessShardsError))
    if world.main:
        print(closing(config, reason, asked, world), flush=True)
    # After a signal torchrun is ending by itself, or has nodes to take in and starts again.
    return End(RESUME if reason.startswith("interrupted") else 0, for_good=reason == TIME_IS_UP)


def _print(composed: Composing, overrides: list[str]) -> int:
    """The configuration as it composes, whether or not this machine could run it."""
    print(as_yaml(composed(overrides, lambda _: [])), end="")
    return 0


def closing(config: RunConfig, reason: str, asked: Asked, world: World) -> str:
    """What a person wants to know at the end: how good, where, and how to go on."""
    try:
        summary = json.loads((config.folder / "summary.json").read_text())
    except (OSError, ValueError):  # the disk of the run folder has failed, and that was told
        summary = {"steps": "?", "images_seen": "?"}
    again = [o for o in asked.overrides if not o.startswith(("stop_after=", "processes="))]
    if world.size != asked.compose(again, lambda _: []).processes:
        again.append(f"processes={world.size}")
    hint = "" if world.size == world.local_size else "   (under the same launcher)"
    lines = [f"{reason} at step {summary['steps']} of {config.steps}, {summary['images_seen']} images seen"]
    lines += closing_lines(config.folder)
    lines += [
        f"run folder      {config.folder}",
        f"to resume       {_program()} {asked.verb} {shlex.join(again)}{hint}",
    ]
    return "\n".join(lines)


def _program() -> str:
    """How a person at this shell calls us: by name where it is on the path, else by the file beside this interpreter."""
    beside = Path(sys.executable).with_name("softmoe")
    if shutil.which("softmoe"):
        return "softmoe"
    if not beside.is_file():
        return f"{sys.executable} -m softmoe_train"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
