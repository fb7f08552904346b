"""This file owns what a fine-tuning is composed of: the settings of its recipe around the model and the weights of a checkpoint.

What comes out is the configuration of a run: whoever trains it does not know that it is a fine-tuning.
"""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import field_validator

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.folder import STEP_FOLDER
from softmoe_train.config import (
    NO_FILE,
    ConfigError,
    Record,
    Tree,
    compose,
    compose_own,
    config_folder,
    filled,
    split_overrides,
)
from softmoe_train.settings import RunConfig
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.sources import opened_source

Check = Callable[[RunConfig], list[str]]

RECIPES = "finetune"  # the folder of conf/recipe
JOB_TYPE = "observe.wandb.job_type"
DECIDED = {  # of a run, by ckpt= and weights=
    "warm": "the weights to start from are those of ckpt=",
    "warm.source": "it is ckpt=",
    "warm.weights": "it is weights=",
    "warm.head": "a head always starts fresh",
}


class FinetuneConfig(Record):
    """The keys of `softmoe finetune` beside those of a run."""

    ckpt: str | None
    weights: Literal["model", "average"]

    @field_validator("ckpt")
    @classmethod
    def _given(cls, ckpt: str | None) -> str:
        if ckpt is None:
            raise ValueError("ckpt is not set; give the weights to start from, as in ckpt=runs/mine")
        return ckpt


def compose_finetune(overrides: list[str], check: Check) -> RunConfig:
    """The run that `softmoe finetune` with these overrides is; raises ConfigError with every mistake, as `compose` does."""
    own, others = split_overrides(FinetuneConfig, RunConfig, overrides)
    asked, problems = compose_own(FinetuneConfig, "finetune.yaml", own)
    model = None
    if asked is not None and asked.ckpt is not None:
        try:
            model = _model_of(asked.ckpt, asked.weights)
        except CheckpointError as error:
            problems += [f"{error.what.replace('warm.source=', 'ckpt=')}: {problem}" for problem in error.problems]
    problems += recipe_problems(others) + decided_problems(others, model is not None)
    if problems or asked is None or asked.ckpt is None:
        raise ConfigError([*problems, *_others_problems(others)])
    if "name" not in map(key_of, others):
        others = [f"name={_name(recipe_of(others), asked.ckpt, asked.weights)}", *others]
    return compose_around(others, model, asked.ckpt, asked.weights, check)


def compose_around(
    overrides: list[str],
    model: Mapping[str, Any] | None,
    ckpt: str,
    weights: str,
    check: Check,
    also: Callable[[Tree], object] = lambda _: None,
) -> RunConfig:
    """A run of these settings whose model is `model`, where that is known, with the `weights` of `ckpt` and a fresh head.

    Of its own it has the size of the images, the number of classes and what `overrides` say of `model.KEY` in so many words. `also` may
    change more of the tree. To W&B it is a job of the type finetune, unless it was given one.
    """
    keys = [
        "model.image_size",
        "model.num_classes",
        *(key for key in map(key_of, overrides) if key.startswith("model.")),
    ]

    def change(tree: Tree) -> None:
        if model is not None:
            composed, tree["model"] = tree["model"], filled(dict(model), tree["model"])
            for key in keys:
                _copy_leaf(composed, tree["model"], key.split(".")[1:])
        tree["warm"] |= {"source": ckpt, "weights": weights, "head": "fresh"}
        also(tree)
        wandb = tree["observe"].get("wandb") if isinstance(tree["observe"], dict) else None
        if isinstance(wandb, dict) and wandb.get("job_type") == "pretrain" and JOB_TYPE not in map(key_of, overrides):
            tree["observe"] = {**tree["observe"], "wandb": {**wandb, "job_type": "finetune"}}

    return compose(RunConfig, ["warm=weights", *overrides], check, change)


def recipe_problems(overrides: list[str]) -> list[str]:
    """Why these overrides name no recipe of a fine-tuning."""
    recipe, use = recipe_of(overrides), f"use one of {', '.join(recipes())}"
    if recipe is None:
        return [f"recipe is not set; {use}, which take any data= and model.num_classes="]
    if recipe not in recipes():
        what = (
            "is not for fine-tuning"
            if (config_folder() / "recipe" / f"{recipe}.yaml").is_file()
            else NO_FILE + "recipe"
        )
        return [f"recipe={recipe}: {what}; {use}"]
    return []


def recipes() -> list[str]:
    """The recipes of fine-tunings, as `recipe=` takes them."""
    files = (config_folder() / "recipe" / RECIPES).glob("*.yaml")
    return sorted(f"{RECIPES}/{file.stem}" for file in files if not file.stem.startswith("_"))


def recipe_of(overrides: list[str]) -> str | None:
    """The recipe that they choose."""
    chosen = [override.partition("=")[2] for override in overrides if key_of(override) == "recipe"]
    return chosen[-1] if chosen else None


def key_of(override: str) -> str:
    """What an override sets."""
    return override.lstrip("+").partition("=")[0]


def _model_of(ckpt: str, weights: Literal["model", "average"]) -> Mapping[str, Any] | None:
    """The settings of the model that these weights are of; None where they do not tell. Raises CheckpointError."""
    with opened_source(_warm(ckpt, weights)) as source:
        return source.model


def _warm(ckpt: str, weights: Literal["model", "average"]) -> WarmConfig:
    try:
        return WarmConfig(source=ckpt, weights=weights, noise=0.0, head="fresh", allow_new=[], ignore=[])
    except ValueError as error:  # a pickle
        raise CheckpointError("ckpt", [str(detail["ctx"]["error"]) for detail in error.errors()]) from None  # pyright: ignore[reportAttributeAccessIssue]


def decided_problems(overrides: list[str], known: bool) -> list[str]:
    """What is asked for that the checkpoint decides, or not asked for where it cannot tell."""
    keys = list(map(key_of, overrides))
    problems = [f"{key}: {why}; leave it out" for key, why in DECIDED.items() if key in keys]
    if "model" in keys and known:
        problems.append("model: it is that of ckpt=; leave it out, and change single keys, as in model.image_size=384")
    return problems


def _others_problems(overrides: list[str]) -> list[str]:
    """What else is wrong with them, where they cannot be composed as they are."""
    try:
        compose(RunConfig, [o for o in overrides if key_of(o) not in ("model", "recipe", *DECIDED)], lambda _: [])
    except ConfigError as error:
        return error.problems
    return []


def _name(recipe: str | None, ckpt: str, weights: str) -> str:
    """What the run is called where nobody says: of which set it is, and of which weights."""
    path = PurePosixPath(ckpt.partition("://")[2] or ckpt)
    parts = [part for part in path.parts if part not in ("checkpoints", "..", ".", "/")] or ["weights"]
    of = [parts[-1]] if not STEP_FOLDER.fullmatch(parts[-1]) else parts[-2:]
    kind = [] if weights == "model" else [weights]
    return "-".join([RECIPES, str(recipe).rpartition("/")[2], "of", *of, *kind]).removesuffix(".safetensors")


def _copy_leaf(source: Tree, target: Tree, path: list[str]) -> None:
    """Have `target` hold what `source` does at a path; a path that leads nowhere was told by whoever composed it."""
    for part in path[:-1]:
        if not isinstance(source, dict) or not isinstance(target, dict) or part not in source or part not in target:
            return
        source, target = source[part], target[part]
    if isinstance(source, dict) and isinstance(target, dict) and path[-1] in source:
        target[path[-1]] = source[path[-1]]
