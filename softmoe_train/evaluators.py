"""This file owns which evaluators a run has: what its settings ask for, each built once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from softmoe_train.data import Batch, DataConfig, SyntheticConfig, build_eval_stream
from softmoe_train.data.stream import EvalStream
from softmoe_train.data.synthetic import SyntheticEvalStream
from softmoe_train.dist import World
from softmoe_train.evals.averaged import AveragedEvaluator
from softmoe_train.evals.finetune import FinetuneEvaluator
from softmoe_train.evals.on_sets import FeatureEvaluator, FeatureSets
from softmoe_train.evals.routing import FirstImages, RoutingConfig, RoutingEvaluator, parts_of
from softmoe_train.evals.settings import upstream_sets
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.loop import Evaluator
from softmoe_train.model.records import moe_blocks
from softmoe_train.observe.log import SilentLog
from softmoe_train.settings import RunConfig

Over = Callable[[Iterable[Batch]], Iterable[Batch]]  # batches with a sign of life for each


def build_evaluators(config: RunConfig, world: World, over: Over) -> dict[str, Evaluator]:
    """The evaluators by source, the first part of their metrics' names; those of the averaged weights where there are such.

    Every batch that one of them takes passes through `over`.
    """
    evaluators: dict[str, Evaluator] = {}
    upstream, finetune = config.evals.upstream, config.evals.finetune
    if upstream is not None:
        sets = {
            name: over(_held_out(config, data, world, "test", upstream.batch_size))
            for name, data in upstream_sets(config.evals, config.data).items()
        }
        evaluators["upstream"] = UpstreamEvaluator(upstream, sets, config.loss, config.model.num_classes)
    if finetune is not None:
        as_upstream = UpstreamConfig(every=finetune.every, batch_size=finetune.batch_size, sets={})
        asked: list[tuple[Literal["val", "test"], bool]] = [
            ("val", config.data.holdout is not None),
            ("test", finetune.test),
        ]
        measured = {
            part: UpstreamEvaluator(as_upstream, {part: over(batches)}, config.loss, config.model.num_classes)
            for part, wanted in asked
            if wanted
            for batches in [_held_out(config, config.data, world, part, finetune.batch_size)]
        }
        evaluators["finetune"] = FinetuneEvaluator(finetune, measured.get("val"), measured.get("test"), config.steps)
    features = FeatureSets(config.evals.on_sets, image_size=config.model.image_size, world=world)
    evaluators |= features.evaluators(over)
    if config.average is not None:
        # Of features those of the averaged weights are others, so these evaluators must not share with those above.
        alike = {**evaluators, **features.evaluators(over)}
        evaluators |= {f"{source}_average": AveragedEvaluator(one) for source, one in alike.items()}
    if config.evals.routing is not None and config.model.has_experts:
        routing, blocks = config.evals.routing, moe_blocks(config.model.moe.blocks, config.model.depth)
        images = over(_first_images(config, routing, world))
        last = config.steps if config.steps >= routing.every else None  # a trial of the wiring has nothing to show
        evaluators["router"] = RoutingEvaluator(routing, images, blocks, main=world.main, last=last)
    return evaluators


def _held_out(
    config: RunConfig, data: DataConfig, world: World, part: Literal["val", "test"], batch_size: int
) -> EvalStream | SyntheticEvalStream:
    return build_eval_stream(
        data,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        batch_size=batch_size,
        rank=world.rank,
        world=world.size,
        part=part,
    )


def tell(evaluators: Mapping[str, Evaluator], log: SilentLog) -> None:
    """Log once what the evaluators of features measure on, so that two runs can prove that they used the same split."""
    for source, one in evaluators.items():
        if isinstance(one, FeatureEvaluator):
            log.record(source, *one.told)


def _first_images(config: RunConfig, routing: RoutingConfig, world: World) -> FirstImages:
    """Read in this process: it is one batch."""
    part, parts = parts_of(routing, config.model.group_images, world.size)
    data = config.data
    stream = build_eval_stream(
        data if isinstance(data, SyntheticConfig) else data.model_copy(update={"workers": 0, "text": None}),
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        batch_size=part * parts,
        rank=world.rank,
        world=world.size,
    )
    return FirstImages(stream, parts, routing.images)
