"""This file owns `softmoe plan`: what a run would cost, or a comparison of several, on any machine and in one process."""

import json
import sys
from pathlib import Path
from typing import Any

from softmoe_train.asked import dense_problems, unread
from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, compose, compose_own, expand_sweep, split_overrides
from softmoe_train.plan.make import Plan, make_plan
from softmoe_train.plan.settings import PlanConfig, plan_problems
from softmoe_train.plan.table import print_comparison, print_plan
from softmoe_train.settings import RunConfig


def plan(overrides: list[str]) -> int:
    """Print the plan of one run; raises ConfigError with all that keeps it from being one."""
    _check_alone()
    own, run = _compose(overrides)
    for told in unread(run.model, overrides):
        print(f"softmoe plan: {told}", file=sys.stderr, flush=True)
    made = make_plan(run, *own.world(run), axes=True)
    print_plan(made)
    _write(own, {"overrides": overrides, **made.document()})
    return 0


def compare(overrides: list[str]) -> int:
    """Print one table of all points of a sweep that could run; then raises ConfigError where some could not, each with its reasons."""
    _check_alone()
    points = expand_sweep(overrides)
    plans: list[tuple[list[str], Plan]] = []
    asked, problems = None, []
    for point in points:
        swept = [override for i, override in enumerate(point) if any(other[i] != override for other in points)]
        try:
            asked, run = _compose(point)
        except ConfigError as error:
            problems += [f"{' '.join(swept)}: {problem}" if swept else problem for problem in error.problems]
            continue
        plans.append((swept, make_plan(run, *asked.world(run), axes=False)))
    if asked is not None:
        print_comparison(plans)
        _write(asked, {"plans": [{"overrides": swept, **made.document()} for swept, made in plans]})
    if problems:
        raise ConfigError(problems)
    return 0


def _check_alone() -> None:
    if under_a_launcher():
        raise ConfigError(["softmoe plan is one process; start it without a launcher, and give it ranks="])


def _problems(config: RunConfig, own: PlanConfig | None, overrides: list[str]) -> list[str]:
    return [] if own is None else plan_problems(config, own) + dense_problems(config.model, overrides)


def _compose(overrides: list[str]) -> tuple[PlanConfig, RunConfig]:
    """The verb's own keys and the run's; ConfigError tells all mistakes in both."""
    ours, others = split_overrides(PlanConfig, RunConfig, overrides)
    own, problems = compose_own(PlanConfig, "plan.yaml", ours)
    try:
        run = compose(RunConfig, others, lambda config: _problems(config, own, others))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems or own is None:
        raise ConfigError(problems)
    return own, run


def _write(own: PlanConfig, document: dict[str, Any]) -> None:
    if own.out is not None:
        Path(own.out).write_text(json.dumps(document, indent=1) + "\n")
