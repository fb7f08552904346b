"""This file owns which evaluators a run has: what its settings ask for, each built once."""

from collections.abc import Callable, Iterable

from softmoe_train.data import Batch, DataConfig, ImageStream, SyntheticConfig, build_eval_stream, build_stream
from softmoe_train.dist import World
from softmoe_train.evals.averaged import AveragedEvaluator
from softmoe_train.evals.routing import FirstImages, RoutingEvaluator
from softmoe_train.evals.upstream import UpstreamEvaluator
from softmoe_train.loop import Evaluator
from softmoe_train.model.records import moe_blocks
from softmoe_train.settings import RunConfig

Over = Callable[[Iterable[Batch]], Iterable[Batch]]  # batches with a sign of life for each


def build_evaluators(config: RunConfig, world: World, over: Over) -> dict[str, Evaluator]:
    """The evaluators by source, the first part of their metrics' names; those of the averaged weights where there are such.

    Every batch that one of them takes passes through `over`.
    """
    evaluators: dict[str, Evaluator] = {}
    if config.evals.upstream is not None:
        batches = build_eval_stream(
            config.data,
            image_size=config.model.image_size,
            num_classes=config.model.num_classes,
            seed=config.seed,
            batch_size=config.evals.upstream.batch_size,
            rank=world.rank,
            world=world.size,
        )
        evaluators["upstream"] = UpstreamEvaluator(config.evals.upstream, over(batches), config.loss)
    if config.average is not None:
        evaluators |= {f"{source}_average": AveragedEvaluator(live) for source, live in evaluators.items()}
    if config.evals.routing is not None and config.model.has_experts:
        images = FirstImages(_first_stream(config, world), config.evals.routing.batch_size, config.model.group_images)
        blocks = moe_blocks(config.model.moe.blocks, config.model.depth)
        evaluators["router"] = RoutingEvaluator(config.evals.routing, over(images), blocks, main=world.main)
    return evaluators


def _first_stream(config: RunConfig, world: World) -> ImageStream:
    """The training sequence in batches of the images that routers are looked at with, prepared as held-out ones are."""
    assert config.evals.routing is not None
    streams = config.data.streams
    return build_stream(
        _plain(config.data),
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        global_batch=-(-config.evals.routing.images // streams) * streams,
        rank=world.rank,
        world=world.size,
    )


def _plain(data: DataConfig) -> DataConfig:
    """Without augmentation, and read in this process: it is one batch."""
    if isinstance(data, SyntheticConfig):
        return data.model_copy(update={"mixup": None})
    plain = {"train_transform": data.test_transform, "randaugment": None, "mixup": None, "scaled_decode": False}
    return data.model_copy(update={**plain, "text": None, "workers": 0})
