"""This file owns the fine-tunings at the end of a run: how each is composed from it, and what its own records get of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from softmoe_train.changes import SHARDS_OF_A_SOURCE, changed_settings
from softmoe_train.checkpoint.folder import step_folder, step_folders
from softmoe_train.config import ConfigError, Tree, compose_own, flat, load_yaml, split_overrides
from softmoe_train.finetune import (
    Check,
    FinetuneConfig,
    compose_around,
    decided_problems,
    key_of,
    recipe_problems,
)
from softmoe_train.observe.log import SilentLog
from softmoe_train.settings import RunConfig

# Where and how they compute is the run's, unless they say otherwise; by the names of `overrides`.
AS_THE_RUN = (
    "seed", "processes", "elastic", "device", "precision", "compile", "time_limit", "hang_limit", "parallel", "engine", "observe",
    "checkpoint.grace", "checkpoint.max_failures",
)  # fmt: skip
OF_THE_RUN = (
    "ckpt",
    "run_dir",
    "name",
    "processes",
    "elastic",
    "device",
    "time_limit",
    "finetune",
    "checkpoint.folder",
)


def child_of(config: RunConfig, name: str, check: Check) -> RunConfig:
    """The run that fine-tunes the last weights of `config` as `finetune.<name>` says; raises ConfigError with every mistake."""
    asked = config.finetune[name]
    own, others = split_overrides(FinetuneConfig, RunConfig, asked.overrides)
    words = [f"recipe={asked.recipe}", *others]
    source = str(step_folder(config.checkpoints, config.steps))
    settings, problems = compose_own(FinetuneConfig, "finetune.yaml", [f"ckpt={source}", *own])
    problems += recipe_problems(words) + decided_problems(words, known=True)
    given = {key_of(word) for word in asked.overrides}
    problems += [f"{key}: it is the run's; leave it out" for key in OF_THE_RUN if key in given]
    problems += [f"recipe={asked.recipe} is named already; leave it out of overrides"] * ("recipe" in given)
    if settings is None or problems:
        raise ConfigError(_of(name, problems))

    def change(tree: Tree) -> None:
        for key in AS_THE_RUN:
            if not any(one == key or one.startswith(f"{key}.") for one in given):
                _copy(config.model_dump(), tree, key.split("."))
        tree["name"] = f"{config.name}-{name}"
        tree["run_dir"] = str(folder_of(config, name))
        if config.checkpoint.folder is not None:
            tree["checkpoint"]["folder"] = f"{config.checkpoint.folder}/finetune/{name}"

    try:
        return compose_around(words, config.model.model_dump(), source, settings.weights, check, change)
    except ConfigError as error:
        raise ConfigError(_of(name, error.problems)) from None


def children_of(config: RunConfig) -> dict[str, RunConfig]:
    """The fine-tunings at the end of a run whose settings were checked, by the key that asks for each."""
    return {f"finetune.{name}": child_of(config, name, lambda _: []) for name in config.finetune}


def at_end_problems(config: RunConfig, check: Check) -> list[str]:
    """Every mistake in the fine-tunings at the end of a run that has yet to begin, which a month later would be too late; `check` tells those of one."""

    def problems_of(child: RunConfig) -> list[str]:
        begun = step_folders(child.checkpoints, complete=True)
        # The weights that it starts from do not exist yet; one that has begun does not need them.
        return check(child if begun else child.model_copy(update={"warm": None}))

    problems: list[str] = []
    for name in config.finetune:
        if not name or "/" in name or name in (".", ".."):
            problems.append(f"finetune.{name}: {name!r} must be a plain name, since it is that of a folder")
            continue
        try:
            child_of(config, name, problems_of)
        except ConfigError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"finetune.{name}: its checkpoints cannot be read: {error}")
    return problems


def folder_of(config: RunConfig, name: str) -> Path:
    """Its run folder."""
    return config.folder / "finetune" / name


def is_complete(run: RunConfig) -> bool:
    """Whether its folder holds this very run, come to its end: these settings, these training shards, this many steps; and its fine-tunings."""
    if not _is_complete(run) or not all(_has_ended(folder_of(run, name)) for name in run.finetune):
        return False
    try:
        return all(map(_is_complete, children_of(run).values()))
    except ConfigError:  # told by those who check them
        return False


def _has_ended(folder: Path) -> bool:
    """What can be told without composing a fine-tuning, which takes a second."""
    return _summary_in(folder).get("ended") == "complete"


def _is_complete(run: RunConfig) -> bool:
    summary = summary_of(run)
    if summary.get("ended") != "complete" or summary.get("steps") != run.steps:
        return False
    try:
        saved = load_yaml(run.folder / "config.yaml")
    except (OSError, ValueError, YAMLError):
        return False
    # Shards may have been moved: whether those of another name are the same is told where the run goes on.
    before, now = flat(saved), flat(run.as_saved())
    shards = [key for key in now if key == "data.train" or SHARDS_OF_A_SOURCE.fullmatch(key)]
    return not changed_settings(saved, run.as_saved()) and all(before.get(key) == now[key] for key in shards)


def measured(config: RunConfig) -> dict[str, float]:
    """What the fine-tunings measured at their end, by the names that the run gives it, where its own records lack it."""
    told = summary_of(config).get("metrics", {})
    found: dict[str, float] = {}
    for name in config.finetune:
        metrics: Mapping[str, Any] = json.loads((folder_of(config, name) / "summary.json").read_text()).get(
            "metrics", {}
        )
        for source in ("finetune", "finetune_average"):
            parts = [part for part in ("test", "val") if metrics.get(f"{source}/{part}/top1") is not None]
            if parts:
                found[f"{source}/{name}/top1"] = metrics[f"{source}/{parts[0]}/top1"]
    return {name: value for name, value in found.items() if told.get(name) != value}


def tell_results(config: RunConfig, values: Mapping[str, float], log: SilentLog) -> None:
    """Have the records of the run, at its last step, say what its fine-tunings came to."""
    log.report_late(config.steps, int(summary_of(config).get("images_seen", 0)), values)
    for name, value in values.items():
        log.message(f"{name}  {value:.4f}")


def summary_of(config: RunConfig) -> dict[str, Any]:
    """The summary in its run folder, empty where there is none."""
    return _summary_in(config.folder)


def _summary_in(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def _of(name: str, problems: list[str]) -> list[str]:
    return [f"finetune.{name}: {problem}" for problem in problems]


def _copy(source: Mapping[str, Any], target: Tree, path: Sequence[str]) -> None:
    for part in path[:-1]:
        source, target = source[part], target[part]
    target[path[-1]] = source[path[-1]]
