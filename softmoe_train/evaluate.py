"""This file owns measuring a checkpoint: the evaluators of a run on weights that no run is training."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple

import rich.console
import rich.progress

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.folder import checkpoint_at
from softmoe_train.checkpoint.inspect import found, read_contents
from softmoe_train.checkpoint.remote import place_of
from softmoe_train.config import ConfigError, JsonOut, Record, Tree, compose, compose_onto
from softmoe_train.data import Batch, Cursor, check_evaluated
from softmoe_train.dist import World, control_group, pick_device, process_group
from softmoe_train.evals.on_sets import FeatureEvaluator, feature_problems
from softmoe_train.evals.settings import set_problems
from softmoe_train.evaluators import build_evaluators
from softmoe_train.loop import TrainState
from softmoe_train.observe.figures import Alarm, Figure
from softmoe_train.run import build_engine, build_topology, index_shards
from softmoe_train.settings import RunConfig, compute_problems, label_problems
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.sources import opened_source
from softmoe_train.warm.start import fresh_tensors, start_warm, warm_problems

# Of a checkpoint's run: how it was laid out there and what only training reads. A measurement has its own.
NOT_TAKEN_OVER = (
    "processes",
    "parallel",
    "engine",
    "micro_batches",
    "compile",
    "device",
    "elastic",
    "average",
    "warm",
    "optim",
)
CHOICES = ("recipe", "shrink")


class EvalConfig(Record):
    """What a measurement has beside the keys of a run."""

    ckpt: str | None
    weights: Literal["model", "average"]
    out: JsonOut


class Measured(NamedTuple):
    """The run whose settings and evaluators a measurement has, of which weights."""

    run: RunConfig
    own: EvalConfig
    what: str  # the weights, in words
    step: int  # of the checkpoint; 0 for other files
    images_seen: int

    @property
    def processes(self) -> int:
        """Local workers to start."""
        return self.run.processes


def measured(own: EvalConfig, overrides: list[str], size: int | None, local_size: int | None) -> Measured:
    """What is to be measured, on `size` ranks (None: on as many as `processes` says); raises ConfigError with every mistake."""
    if own.ckpt is None:
        raise ConfigError(["ckpt is not set; name what to measure, as in ckpt=runs/mine"])
    warm = WarmConfig(source=own.ckpt, weights=own.weights, noise=0.0, head="auto", allow_new=[], ignore=[])
    saved, what, step, images_seen = _saved(own.ckpt, warm)
    problems = [
        f"{override}: a checkpoint has its settings; name the keys that you want otherwise"
        for override in overrides
        if override.partition("=")[0] in CHOICES
    ]
    if problems:
        raise ConfigError(problems)

    def check(config: RunConfig) -> list[str]:
        ranks = size or config.processes
        return eval_problems(_as_measured(config, warm, ranks, step), warm, ranks, local_size or ranks)

    config = compose_onto(RunConfig, saved, overrides, check)
    return Measured(_as_measured(config, warm, size or config.processes, step), own, what, step, images_seen)


def _saved(ckpt: str, warm: WarmConfig) -> tuple[Tree, str, int, int]:
    """The settings of the run that made a checkpoint, what it is in words, its step and how many images it had seen."""
    default = compose(RunConfig, ["optim=sgd", "optim.momentum=0.0"], lambda _: []).model_dump()
    try:
        with opened_source(warm) as source:
            what, model = source.what, source.model
        if "://" not in ckpt and not Path(ckpt).is_dir():
            return {**default, "model": {**default["model"], **(model or {})}}, what, 0, 0
        found("ckpt", ckpt)
        contents = read_contents(checkpoint_at(place_of(ckpt)))
    except CheckpointError as error:
        named = [one if one.startswith(error.what) else f"{error.what}: {one}" for one in error.problems]
        raise ConfigError(list(map(as_ckpt, named))) from error
    saved: Tree = dict(contents.config)
    seen = contents.loop.get("images_seen")
    return (
        {**saved, **{key: default[key] for key in NOT_TAKEN_OVER}},
        what,
        contents.mark.step,
        seen if isinstance(seen, int) else 0,
    )


def as_ckpt(told: str) -> str:
    """What a warm start says, in the keys of who gave a checkpoint to be measured."""
    return told.replace("warm.source", "ckpt").replace("warm.weights", "weights")


def _as_measured(config: RunConfig, warm: WarmConfig, size: int, step: int) -> RunConfig:
    """The same without anything that only training has: a batch is whatever goes through the ranks at once, `step` is the last."""
    batch = size * config.model.group_images
    data = config.data.model_copy(update={"streams": batch, "mixup": None})
    evals = config.evals
    if evals.routing is not None:  # `softmoe inspect routing=true` draws
        evals = evals.model_copy(update={"routing": evals.routing.model_copy(update={"pictures_every": 0})})
    return config.model_copy(
        update={
            "warm": warm,
            "data": data,
            "evals": evals,
            "steps": step,
            "batch_size": batch,
            "micro_batches": 1,
            "average": None,
        }
    )


def eval_problems(config: RunConfig, warm: WarmConfig, size: int, local_size: int) -> list[str]:
    """Every mistake in what is to be measured; looks at files but starts nothing."""
    problems = compute_problems(config, size, local_size)
    if all(value is None for value in dict(config.evals).values()):
        problems.append("evals=[]: there is nothing to measure; choose some, as in evals=[upstream]")
    if list(filter(None, dict(config.evals).values())) == [config.evals.routing] and not config.model.has_experts:
        problems.append(
            "evals=[routing]: no block of this model holds experts (model.moe.blocks), so it would measure nothing; choose others, as in "
            "evals=[upstream]"
        )
    test, held_out = config.evals.reads_test(config.model), config.evals.reads_held_out(config.data)
    if test or config.evals.finetune is not None:
        image_size = config.model.image_size
        problems += check_evaluated(config.data, image_size=image_size, needs_test=test, needs_train=held_out)
        problems += label_problems(config)
        problems += set_problems(config.evals, config.data, config.model)
    problems += feature_problems(config.evals.on_sets, config.model.image_size)
    misfits = warm_problems(warm, config.model, config.seed)
    problems += [as_ckpt(problem) for problem in misfits]
    fresh = [] if misfits or config.evals.upstream is None else fresh_tensors(warm, config.model, config.seed)
    if any(name.startswith("head.") for name in fresh):
        problems.append(
            f"evals.upstream with model.num_classes={config.model.num_classes}: the checkpoint has no head of so many classes, and a fresh "
            f"one would be measured; leave model.num_classes out, or measure features alone"
        )
    return problems


def evaluate(asked: Measured, world: World) -> dict[str, float]:
    """Measure, as one rank of `world`; the same values on every rank. Raises CheckpointError on all alike where bytes are damaged."""
    config, device = asked.run, pick_device(asked.run.device, world.local_rank)
    assert config.warm is not None
    with process_group(world, device):
        engine = build_engine(config, build_topology(config, world, device), device)
        start_warm(
            config.warm,
            config.model,
            engine,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            group=control_group(world),
        )
        index_shards(config, world, needs_train=config.evals.reads_held_out(config.data))
        state = TrainState(engine, asked.step, asked.images_seen, Cursor(0), wandb_id="")
        evaluators = build_evaluators(config, world, lambda batches: _Shown(batches, world.main))
        for one in evaluators.values():
            if isinstance(one, FeatureEvaluator) and world.main:
                print(one.told[0], flush=True)
        values: dict[str, float] = {}
        for source, evaluator in evaluators.items():
            for name, value in evaluator.run(state):
                if isinstance(value, Alarm):
                    if world.main:
                        print(f"warning: {value.title}: {value.text}", file=sys.stderr, flush=True)
                elif not isinstance(value, Figure):
                    values[f"{source}/{name}"] = float(value)
    return values


def document(asked: Measured, values: dict[str, float]) -> dict[str, Any]:
    """What was measured, as JSON."""
    facts = {"ckpt": asked.own.ckpt, "weights": asked.own.weights, "step": asked.step, "images_seen": asked.images_seen}
    return {**facts, "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()}}


def write_json(path: str, asked: Measured, values: dict[str, float]) -> None:
    """Write the document of a measurement."""
    Path(path).write_text(json.dumps(document(asked, values), indent=1, allow_nan=False) + "\n")


class _Shown:
    """The same batches, counted by a bar where a terminal watches rank 0; may be iterated again and again."""

    def __init__(self, batches: Iterable[Batch], main: bool) -> None:
        self._batches = batches
        self._hidden = not (main and sys.stderr.isatty())

    def __iter__(self) -> Iterator[Batch]:
        return iter(
            rich.progress.track(
                self._batches,
                description="batches",
                total=len(self._batches) if isinstance(self._batches, Sized) else None,
                console=rich.console.Console(file=sys.stderr),
                transient=True,
                disable=self._hidden,
            )
        )
