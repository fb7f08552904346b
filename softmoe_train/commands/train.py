"""This file owns `softmoe train`: one worker under a launcher, or the launcher of local workers."""

import json
import os
import shlex
import sys

from softmoe_train.config import ConfigError, as_yaml, compose
from softmoe_train.dist import world_of
from softmoe_train.launching.environment import adopt_environment, under_launcher
from softmoe_train.launching.local import launch_local
from softmoe_train.launching.worker import run_worker
from softmoe_train.run import RunConfig, check
from softmoe_train.run import train as train_rank

GRACE_SECONDS = 5  # what workers get to end after Ctrl-C; they save nothing then


def train(overrides: list[str], *, print_only: bool) -> int:
    """Compose and check the configuration, then train with it; raises ConfigError before anything is started."""
    if under_launcher(os.environ):
        adopt_environment(os.environ)
        return run_worker(lambda: _work(overrides, print_only))
    config = compose(RunConfig, overrides, lambda c: check(c, c.processes))
    if print_only:
        print(as_yaml(config), end="")
        return 0
    if config.processes > 1:
        command = [sys.executable, "-m", "softmoe_train", "train", *overrides]
        return launch_local(config.processes, command, grace_seconds=GRACE_SECONDS)
    return _train(config, overrides)


def _work(overrides: list[str], print_only: bool) -> int:
    """One rank of several, whoever started it."""
    world = world_of(os.environ)
    try:
        config = compose(RunConfig, overrides, lambda c: check(c, world.size))
    except ConfigError as error:
        if world.main:  # all ranks find the same
            print(f"softmoe train: {error}", file=sys.stderr)
        return 2
    if print_only:
        print(as_yaml(config) if world.main else "", end="")
        return 0
    return _train(config, overrides)


def _train(config: RunConfig, overrides: list[str]) -> int:
    world = world_of(os.environ)
    reason = train_rank(config, world)
    if world.main:
        print(closing(config, reason, overrides), flush=True)
    return 0


def closing(config: RunConfig, reason: str, overrides: list[str]) -> str:
    """What a person wants to know at the end: how good, where, and how to go on."""
    summary = json.loads((config.folder / "summary.json").read_text())
    again = [o for o in overrides if not o.startswith("stop_after=")]
    lines = [f"{reason} at step {summary['steps']} of {config.steps}, {summary['images_seen']} images seen"]
    if "upstream/test/top1" in summary["metrics"]:
        lines.append(f"held-out top-1  {summary['metrics']['upstream/test/top1']:.4f}")
    lines += [f"run folder      {config.folder}", f"to resume       softmoe train {shlex.join(again)}"]
    return "\n".join(lines)
