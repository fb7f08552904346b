"""This file owns which evaluators a run has: what its settings ask for, each built once."""

from collections.abc import Callable, Iterable
from typing import Literal

from softmoe_train.data import Batch, build_eval_stream
from softmoe_train.data.stream import EvalStream
from softmoe_train.data.synthetic import SyntheticEvalStream
from softmoe_train.dist import World
from softmoe_train.evals.averaged import AveragedEvaluator
from softmoe_train.evals.finetune import FinetuneEvaluator
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.loop import Evaluator
from softmoe_train.settings import RunConfig

Over = Callable[[Iterable[Batch]], Iterable[Batch]]  # batches with a sign of life for each


def build_evaluators(config: RunConfig, world: World, over: Over) -> dict[str, Evaluator]:
    """The evaluators by source, the first part of their metrics' names; those of the averaged weights where there are such.

    Every batch that one of them takes passes through `over`.
    """
    evaluators: dict[str, Evaluator] = {}
    upstream, finetune = config.evals.upstream, config.evals.finetune
    if upstream is not None:
        batches = _held_out(config, world, "test", upstream.batch_size)
        evaluators["upstream"] = UpstreamEvaluator(upstream, over(batches), config.loss)
    if finetune is not None:
        asked: list[tuple[Literal["val", "test"], bool]] = [
            ("val", config.data.holdout is not None),
            ("test", finetune.test),
        ]
        as_upstream = UpstreamConfig(every=finetune.every, batch_size=finetune.batch_size)
        measured = {
            part: UpstreamEvaluator(as_upstream, over(_held_out(config, world, part, finetune.batch_size)), config.loss)
            for part, wanted in asked
            if wanted
        }
        evaluators["finetune"] = FinetuneEvaluator(finetune, measured.get("val"), measured.get("test"), config.steps)
    if config.average is not None:
        evaluators |= {f"{source}_average": AveragedEvaluator(live) for source, live in evaluators.items()}
    return evaluators


def _held_out(
    config: RunConfig, world: World, part: Literal["val", "test"], batch_size: int
) -> EvalStream | SyntheticEvalStream:
    return build_eval_stream(
        config.data,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        batch_size=batch_size,
        rank=world.rank,
        world=world.size,
        part=part,
    )
