"""This file owns `softmoe train`: one worker under a launcher, or the launcher of local workers."""

import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.folder import step_folders, step_of
from softmoe_train.config import ConfigError, as_yaml, compose
from softmoe_train.dist import World, world_of
from softmoe_train.launching.environment import adopt_environment, under_launcher
from softmoe_train.launching.local import TOLD_CODES, launch_local
from softmoe_train.launching.worker import run_worker
from softmoe_train.loop import NonFiniteLossError
from softmoe_train.run import train as train_rank
from softmoe_train.settings import RunConfig, check

GRACE_SECONDS = 5  # what workers get to end after Ctrl-C; they save nothing then


def train(overrides: list[str], *, print_only: bool) -> int:
    """Compose and check the configuration, then train with it; raises ConfigError before anything is started."""
    try:
        launched = under_launcher(os.environ)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if launched:
        adopt_environment(os.environ)
        return run_worker(lambda: _work(overrides, print_only))
    if print_only:
        return _print(overrides)
    config = compose(RunConfig, overrides, lambda c: check(c, c.processes))
    if config.processes > 1:
        command = [sys.executable, "-m", "softmoe_train", "train", *overrides]
        code = launch_local(config.processes, command, grace_seconds=GRACE_SECONDS)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            print(_interrupted(config), file=sys.stderr)
        return code
    try:
        return _train(config, overrides)
    except KeyboardInterrupt:
        print(_interrupted(config), file=sys.stderr)
        return 128 + signal.SIGINT


def _interrupted(config: RunConfig) -> str:
    """What an interruption cost, and how to go on."""
    complete = step_folders(config.folder / "checkpoints", complete=True)
    if not complete:
        return (
            f"softmoe train: interrupted before the first checkpoint of {config.folder}; the same command starts over"
        )
    return f"softmoe train: interrupted; the same command goes on from step {step_of(complete[-1])} of {config.folder}"


def _work(overrides: list[str], print_only: bool) -> int:
    """One rank of several, whoever started it."""
    world = world_of(os.environ)
    try:
        if print_only:
            return _print(overrides) if world.main else 0
        return _train(compose(RunConfig, overrides, lambda c: check(c, world.size)), overrides)
    except ConfigError as error:
        if world.main:  # all ranks find the same
            print(f"softmoe train: {error}", file=sys.stderr, flush=True)
        return TOLD_CODES[0]


def _train(config: RunConfig, overrides: list[str]) -> int:
    world = world_of(os.environ)
    try:
        reason = train_rank(config, world)
    except (CheckpointError, NonFiniteLossError) as error:
        if world.main:  # these are the same on every rank, and say all there is to say
            print(f"softmoe train: {error}", file=sys.stderr, flush=True)
        return TOLD_CODES[1]
    if world.main:
        print(closing(config, reason, overrides, world), flush=True)
    return 0


def _print(overrides: list[str]) -> int:
    """The configuration as it composes, whether or not this machine could run it."""
    print(as_yaml(compose(RunConfig, overrides, lambda _: [])), end="")
    return 0


def closing(config: RunConfig, reason: str, overrides: list[str], world: World) -> str:
    """What a person wants to know at the end: how good, where, and how to go on."""
    summary = json.loads((config.folder / "summary.json").read_text())
    again = [o for o in overrides if not o.startswith(("stop_after=", "processes="))]
    if world.size != compose(RunConfig, again, lambda _: []).processes:
        again.append(f"processes={world.size}")
    hint = "" if world.size == world.local_size else "   (under the same launcher)"
    lines = [f"{reason} at step {summary['steps']} of {config.steps}, {summary['images_seen']} images seen"]
    if "upstream/test/top1" in summary["metrics"]:
        lines.append(f"held-out top-1  {summary['metrics']['upstream/test/top1']:.4f}")
    lines += [f"run folder      {config.folder}", f"to resume       {_program()} train {shlex.join(again)}{hint}"]
    return "\n".join(lines)


def _program() -> str:
    """How a person at this shell calls us: by name where it is on the path, else by the file beside this interpreter."""
    beside = Path(sys.executable).with_name("softmoe")
    if shutil.which("softmoe"):
        return "softmoe"
    if not beside.is_file():
        return f"{sys.executable} -m softmoe_train"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
