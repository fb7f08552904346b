"""This file owns the assembly of streams from a data configuration, and every check that needs no shard to be read."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.batch import ImageStream
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.labels import build_labels, check_labels
from softmoe_train.data.mixup import Mixup
from softmoe_train.data.places import check_places, names_url
from softmoe_train.data.pool import Pool
from softmoe_train.data.read import SampleReader
from softmoe_train.data.records import DataConfig, Part, SyntheticConfig, TransformConfig, WebDatasetConfig
from softmoe_train.data.remote import Remote, check_cache
from softmoe_train.data.select import build_rules
from softmoe_train.data.sources import NamedSpec, Source, build_training, check_mixture, indexed, training_specs
from softmoe_train.data.stream import EvalStream, Pictures, Share, WebDatasetStream
from softmoe_train.data.synthetic import SyntheticEvalStream, SyntheticPictures, SyntheticStream
from softmoe_train.data.transforms import build_transform, check_transform, may_scale
from softmoe_train.data.workers import Decoding


def make_indexes(cfg: DataConfig, *, part: int, parts: int, needs_test: bool, needs_train: bool = True) -> list[str]:
    """Index every `parts`-th tar from `part` on, and choose among its samples, so that processes that share a cache share the reading.

    An index that is there already is not made again. Returns a message for each tar that cannot be read to its end.
    """
    if isinstance(cfg, SyntheticConfig):
        return []
    catalog, keys, problems = Catalog(Remote(cfg.cache)), dict[str, str](), []

    def told(key: str, error: ValueError) -> str:
        said = str(error)
        return said if said.startswith(key) else f"{key}: {said}"

    wanted = training_specs(cfg) if needs_train else []
    for key, spec in [*wanted, *([NamedSpec("data.test", cfg.test)] if needs_test else [])]:
        try:
            keys = {**dict.fromkeys(catalog.paths(spec, key=key), key), **keys}
        except ValueError as error:
            problems.append(told(key, error))
    held: list[Part] = ["val"] if cfg.holdout is not None else []
    rules = {of: build_rules(cfg, of) for of in ("train", *held, "test")}
    for path, key in sorted(keys.items())[part::parts]:
        try:
            for shard in catalog.shards([path], fresh=True):
                for of in ("test",) if key == "data.test" else ("train", *held):
                    rules[of].choose(shard, catalog)
        except ValueError as error:
            problems.append(told(key, error))
    return problems


def build_stream(
    cfg: DataConfig,
    *,
    image_size: int,
    num_classes: int,
    seed: int,
    global_batch: int,
    rank: int,
    world: int,
    pinned: bool = False,
) -> ImageStream:
    """The endless training stream of `rank`: square images of `image_size` pixels; raises ValueError on mistakes.

    `pinned` has decode workers' batches lie in pinned memory, which only a CUDA device is for.
    """
    problems = check_streams(cfg.streams, global_batch, world) + _check_mixup(cfg, global_batch, world)
    if problems:
        raise ValueError("\n".join(problems))
    mixup = None if cfg.mixup is None else Mixup(cfg.mixup, num_classes, seed)
    share = Share(global_batch, cfg.streams, rank, world)
    match cfg:
        case SyntheticConfig():
            return SyntheticStream(SyntheticPictures(cfg, image_size, num_classes, seed, "train"), share, mixup)
        case WebDatasetConfig():
            for problem in check_mixture(cfg):
                raise ValueError(problem)
            _check_transform(cfg.train_transform, image_size, "data.train_transform")
            catalog = Catalog(Remote(cfg.cache))
            shards, chosen, order, facts = build_training(cfg, catalog, seed)
            scaled = cfg.scaled_decode and may_scale(cfg.train_transform)
            pictures = Pictures(
                _reader(cfg, catalog, Source(shards, chosen), num_classes),
                build_transform(cfg.train_transform, image_size, scaled=scaled),
                image_size,
                seed,
                cfg.randaugment,
                scaled,
            )
            decoding = Decoding(cfg.workers, cfg.prefetch, cfg.max_broken, pinned and cfg.workers > 0)
            return WebDatasetStream(pictures, order, share, mixup, decoding, facts)


def build_eval_stream(
    cfg: DataConfig,
    *,
    image_size: int,
    num_classes: int,
    seed: int,
    batch_size: int,
    rank: int,
    world: int,
    part: Literal["val", "test"] = "test",
) -> EvalStream | SyntheticEvalStream:
    """One pass of `rank` over a held-out part in batches of `batch_size` rows; may be iterated again and again."""
    match cfg:
        case SyntheticConfig():
            pictures = SyntheticPictures(cfg, image_size, num_classes, seed, part)
            num_images = cfg.num_test if part == "test" else max(1, round((cfg.holdout or 0) * cfg.num_train))
            return SyntheticEvalStream(pictures, num_images, batch_size=batch_size, rank=rank, world=world)
        case WebDatasetConfig():
            _check_transform(cfg.test_transform, image_size, "data.test_transform")
            catalog = Catalog(Remote(cfg.cache))
            specs = training_specs(cfg) if part == "val" else [NamedSpec("data.test", cfg.test)]
            sources = [indexed(spec, build_rules(cfg, part), catalog) for spec in specs]
            source = Source([s for one in sources for s in one.shards], [c for one in sources for c in one.chosen])
            reader = _reader(cfg, catalog, source, num_classes)
            return _one_pass(
                cfg, reader, image_size=image_size, seed=seed, batch_size=batch_size, rank=rank, world=world
            )


def build_pool_stream(
    cfg: WebDatasetConfig,
    pool: Pool,
    numbers: NDArray[np.int64],
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world: int,
) -> EvalStream:
    """One pass of `rank` over these samples of a pool (ascending numbers), as held-out images are read: image i is the i-th of them.

    Labels are not read again, and are -1 in its batches.
    """
    source = pool.narrowed(numbers)
    kept = [one.kept for one in source.chosen]
    reader = SampleReader(source.shards, pool.catalog, labels=None, text=None, max_pixels=cfg.max_pixels, kept=kept)
    return _one_pass(cfg, reader, image_size=image_size, seed=0, batch_size=batch_size, rank=rank, world=world)


def _one_pass(
    cfg: WebDatasetConfig,
    reader: SampleReader,
    *,
    image_size: int,
    seed: int,
    batch_size: int,
    rank: int,
    world: int,
) -> EvalStream:
    pictures = Pictures(reader, build_transform(cfg.test_transform, image_size), image_size, seed, None, False)
    decoding = Decoding(cfg.workers, cfg.prefetch, cfg.max_broken, False)
    return EvalStream(pictures, decoding, batch_size=batch_size, rank=rank, world=world)


def check_data(cfg: DataConfig, *, image_size: int, global_batch: int, world: int, needs_test: bool) -> list[str]:
    """Every mistake that shows before a shard is read, each as a full message; empty where all is well."""
    problems = check_streams(cfg.streams, global_batch, world) + _check_mixup(cfg, global_batch, world)
    if isinstance(cfg, SyntheticConfig):
        return problems
    problems += check_mixture(cfg)
    wanted = [NamedSpec("data.test", cfg.test)] if needs_test or cfg.test is not None else []
    problems += _check_specs([*training_specs(cfg), *wanted], cfg) + _check_meaning(cfg)
    if cfg.scaled_decode and not may_scale(cfg.train_transform):
        problems.append(
            f"data.scaled_decode=true with data.train_transform.kind={cfg.train_transform.kind}: only an inception_crop without antialias "
            f"can read a smaller picture; choose it, or use false"
        )
    problems += check_transform(cfg.train_transform, image_size, key="data.train_transform")
    return problems + check_transform(cfg.test_transform, image_size, key="data.test_transform")


def check_evaluated(
    cfg: DataConfig, *, image_size: int, needs_test: bool = True, needs_train: bool = False
) -> list[str]:
    """The same where nothing is trained: of `data.test`, and of the training shards where their held-out part is read."""
    if isinstance(cfg, SyntheticConfig):
        return []
    specs = [*(training_specs(cfg) if needs_train else []), *([NamedSpec("data.test", cfg.test)] if needs_test else [])]
    problems = (check_mixture(cfg) if needs_train else []) + _check_specs(specs, cfg) + _check_meaning(cfg)
    return problems + check_transform(cfg.test_transform, image_size, key="data.test_transform")


def _check_specs(specs: list[NamedSpec], cfg: WebDatasetConfig) -> list[str]:
    problems = []
    for key, spec in specs:
        try:
            check_places(spec, key=key)
        except ValueError as error:
            problems.append(str(error))
    if any(names_url(spec) for _, spec in specs):
        problems += check_cache(cfg.cache)
    return problems


def _check_meaning(cfg: WebDatasetConfig) -> list[str]:
    """Why labels, texts and what is left out do not go together, or a file of them is no such file."""
    problems = []
    if cfg.labels == "none":
        unread = {"data.classes": cfg.classes, "data.keep.labels": cfg.keep.labels, "data.mixup": cfg.mixup}
        problems += [
            f"data.labels=none with {key}={value}: labels are not read; set it to null, or data.labels to hard or multi_hot"
            for key, value in unread.items()
            if value is not None
        ]
    if cfg.text is not None and cfg.mixup is not None:
        problems.append(
            f"data.text={cfg.text} with data.mixup={cfg.mixup}: a text would describe one of the two images that are mixed; set one of "
            f"them to null"
        )
    try:
        build_rules(cfg)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _check_transform(transform: TransformConfig, image_size: int, key: str) -> None:
    for problem in check_transform(transform, image_size, key=key):
        raise ValueError(problem)


def _reader(cfg: WebDatasetConfig, catalog: Catalog, source: Source, num_classes: int) -> SampleReader:
    for problem in check_labels(cfg, num_classes):
        raise ValueError(problem)
    return SampleReader(
        source.shards,
        catalog,
        labels=build_labels(cfg, num_classes),
        text=cfg.text,
        max_pixels=cfg.max_pixels,
        kept=[one.kept for one in source.chosen],
    )


def check_streams(streams: int, global_batch: int, world: int) -> list[str]:
    """Why `streams` cannot be read by `world` ranks, with the streams and the numbers of ranks that could be."""
    worlds = [n for n in range(1, streams + 1) if streams % n == 0 and global_batch % streams == 0]
    these = (
        f" With data.streams={streams} the legal numbers of ranks are {', '.join(map(str, worlds))}." if worlds else ""
    )
    legal = [n for n in range(world, global_batch + 1, world) if global_batch % n == 0]
    if streams in legal:
        return []
    if not legal:
        return [
            f"the global batch of {global_batch} images does not divide into {world} ranks: every rank reads "
            f"equally many; use a multiple of {world}.{these}"
        ]
    rule = f"the number of ranks ({world}) must divide it, and it must divide the global batch ({global_batch})"
    return [f"data.streams={streams}: {rule}; use one of {', '.join(map(str, legal))}.{these}"]


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
