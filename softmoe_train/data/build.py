"""This file owns the assembly of streams from a data configuration, and every check that needs no shard to be read."""

from softmoe_train.data.batch import ImageStream
from softmoe_train.data.index import index_shards
from softmoe_train.data.mixup import Mixup
from softmoe_train.data.order import Order
from softmoe_train.data.places import expand_shards
from softmoe_train.data.read import SampleReader
from softmoe_train.data.records import (
    DataConfig,
    RandAugment,
    ShardSpec,
    SyntheticConfig,
    TransformConfig,
    WebDatasetConfig,
)
from softmoe_train.data.stream import EvalStream, Pictures, Share, WebDatasetStream
from softmoe_train.data.synthetic import SyntheticEvalStream, SyntheticPictures, SyntheticStream
from softmoe_train.data.transforms import build_transform, check_transform, may_scale
from softmoe_train.data.workers import Decoding


def make_indexes(cfg: DataConfig, *, part: int, parts: int, needs_test: bool) -> list[str]:
    """Index every `parts`-th tar from `part` on, so that processes that share a cache share the reading.

    An index that is there already is not made again. Returns a message for each tar that cannot be read to its end.
    """
    if isinstance(cfg, SyntheticConfig):
        return []
    paths = expand_shards(cfg.train, key="data.train")
    if needs_test:
        paths += expand_shards(cfg.test, key="data.test")
    problems = []
    for path in paths[part::parts]:
        try:
            list(index_shards([path]))
        except ValueError as error:
            problems.append(str(error))
    return problems


def build_stream(
    cfg: DataConfig, *, image_size: int, num_classes: int, seed: int, global_batch: int, rank: int, world: int
) -> ImageStream:
    """The endless training stream of `rank`: square images of `image_size` pixels; raises ValueError on mistakes."""
    problems = check_streams(cfg.streams, global_batch, world) + _check_mixup(cfg, global_batch, world)
    if problems:
        raise ValueError("\n".join(problems))
    mixup = None if cfg.mixup is None else Mixup(cfg.mixup, num_classes, seed)
    share = Share(global_batch, cfg.streams, rank, world)
    match cfg:
        case SyntheticConfig():
            return SyntheticStream(SyntheticPictures(cfg, image_size, num_classes, seed, "train"), share, mixup)
        case WebDatasetConfig():
            pictures = _pictures(
                cfg, cfg.train, "data.train", cfg.train_transform, cfg.randaugment, image_size, num_classes, seed
            )
            counts = [shard.count for shard in pictures.reader.shards]
            order = Order(counts, streams=cfg.streams, window=cfg.shuffle_window, block=cfg.block, seed=seed)
            return WebDatasetStream(pictures, order, share, mixup, Decoding(cfg.workers, cfg.prefetch, cfg.max_broken))


def build_eval_stream(
    cfg: DataConfig, *, image_size: int, num_classes: int, seed: int, batch_size: int, rank: int, world: int
) -> EvalStream | SyntheticEvalStream:
    """One pass of `rank` over the held-out set in batches of `batch_size` rows; may be iterated again and again."""
    match cfg:
        case SyntheticConfig():
            pictures = SyntheticPictures(cfg, image_size, num_classes, seed, "test")
            return SyntheticEvalStream(pictures, batch_size=batch_size, rank=rank, world=world)
        case WebDatasetConfig():
            pictures = _pictures(cfg, cfg.test, "data.test", cfg.test_transform, None, image_size, num_classes, seed)
            decoding = Decoding(cfg.workers, cfg.prefetch, cfg.max_broken)
            return EvalStream(pictures, decoding, batch_size=batch_size, rank=rank, world=world)


def check_data(cfg: DataConfig, *, image_size: int, global_batch: int, world: int, needs_test: bool) -> list[str]:
    """Every mistake that shows before a shard is read, each as a full message; empty where all is well."""
    problems = check_streams(cfg.streams, global_batch, world) + _check_mixup(cfg, global_batch, world)
    if isinstance(cfg, SyntheticConfig):
        return problems
    for key, spec, wanted in (("data.train", cfg.train, True), ("data.test", cfg.test, needs_test)):
        try:
            if wanted or spec is not None:
                expand_shards(spec, key=key)
        except ValueError as error:
            problems.append(str(error))
    problems += check_transform(cfg.train_transform, image_size, key="data.train_transform")
    return problems + check_transform(cfg.test_transform, image_size, key="data.test_transform")


def _pictures(
    cfg: WebDatasetConfig,
    spec: ShardSpec | None,
    key: str,
    transform: TransformConfig,
    randaugment: RandAugment | None,
    image_size: int,
    num_classes: int,
    seed: int,
) -> Pictures:
    for problem in check_transform(transform, image_size, key=f"{key}_transform"):
        raise ValueError(problem)
    shards = list(index_shards(expand_shards(spec, key=key)))
    if not sum(shard.count for shard in shards):
        raise ValueError(
            f"{key}={spec} names {len(shards)} shards without a single sample: name shards that hold pictures."
        )
    reader = SampleReader(shards, labels=cfg.labels, num_classes=num_classes, max_pixels=cfg.max_pixels)
    scaled = cfg.scaled_decode and key == "data.train" and may_scale(transform)
    return Pictures(
        reader, build_transform(transform, image_size, scaled=scaled), image_size, seed, randaugment, scaled
    )


def check_streams(streams: int, global_batch: int, world: int) -> list[str]:
    """Why `streams` cannot be read by `world` ranks, with those that could."""
    legal = [n for n in range(world, global_batch + 1, world) if global_batch % n == 0]
    if streams in legal:
        return []
    if not legal:
        return [
            f"the global batch of {global_batch} images does not divide into {world} ranks: every rank reads "
            f"equally many; use a multiple of {world}."
        ]
    rule = f"the number of ranks ({world}) must divide it, and it must divide the global batch ({global_batch})"
    return [f"data.streams={streams}: {rule}; use one of {', '.join(map(str, legal))}."]


def _check_mixup(cfg: DataConfig, global_batch: int, world: int) -> list[str]:
    """Why no image of a global batch has another of its stream to be mixed with."""
    if cfg.mixup is None or cfg.streams != global_batch:
        return []
    legal = [n for n in range(world, global_batch // 2 + 1, world) if global_batch % n == 0]
    use = f"data.streams={' or '.join(map(str, legal))}, or " if legal else ""
    return [
        f"data.mixup={cfg.mixup} with data.streams={cfg.streams}: an image is mixed with the next of its stream in the global batch, "
        f"and of {global_batch} images each stream gives one; use {use}a batch_size of {2 * cfg.streams}"
    ]
