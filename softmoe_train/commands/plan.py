"""This file owns `softmoe plan`: what a run would cost, or a comparison of several, on any machine and in one process."""

import json
from pathlib import Path

from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, compose, compose_own, expand_sweep, split_overrides
from softmoe_train.plan.make import Plan, make_plan
from softmoe_train.plan.settings import PlanConfig, plan_problems
from softmoe_train.plan.table import print_comparison, print_plan
from softmoe_train.settings import RunConfig


def plan(overrides: list[str], *, sweep: bool) -> int:
    """Print the plan, or with `sweep` one table of all its points; raises ConfigError with all mistakes of every point."""
    points = expand_sweep(overrides) if sweep else [overrides]
    asked, problems = [], []
    for point in points:
        try:
            asked.append(_compose(point))
        except ConfigError as error:
            problems += (
                error.problems
                if len(points) == 1
                else [f"{' '.join(_swept(points, point))}: {p}" for p in error.problems]
            )
    if under_a_launcher():
        problems.append("softmoe plan is one process; start it without a launcher")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    plans = [make_plan(run, *own.world(run), axes=not sweep) for own, run in asked]
    if sweep:
        print_comparison(*_table(points, plans))
    else:
        print_plan(plans[0])
    out = asked[0][0].out
    if out is not None:
        documents = [{"overrides": point, **plan.document()} for point, plan in zip(points, plans, strict=True)]
        Path(out).write_text(json.dumps({"plans": documents} if sweep else documents[0], indent=1) + "\n")
    return 0


def _compose(overrides: list[str]) -> tuple[PlanConfig, RunConfig]:
    """The verb's own keys and the run's; ConfigError tells all mistakes in both."""
    ours, others = split_overrides(PlanConfig, RunConfig, overrides)
    own, problems = compose_own(PlanConfig, "plan.yaml", ours)
    try:
        run = compose(RunConfig, others, lambda config: [] if own is None else plan_problems(config, own))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems or own is None:
        raise ConfigError(problems)
    return own, run


def _swept(points: list[list[str]], point: list[str]) -> list[str]:
    """The overrides of a point that are not the same in all points."""
    return [override for i, override in enumerate(point) if any(other[i] != override for other in points)]


def _table(points: list[list[str]], plans: list[Plan]) -> tuple[list[str], list[tuple[list[str], Plan]]]:
    """The swept keys, and their values beside each plan."""
    parts = [[override.partition("=") for override in _swept(points, point)] for point in points]
    keys = [key for key, _, _ in parts[0]]
    return keys, [([value for _, _, value in part], plan) for part, plan in zip(parts, plans, strict=True)]
