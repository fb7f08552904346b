"""This file owns `bench stream`: images per second of the training stream, in one process by stage and through workers.

Beside it are its floors (bare decoding; a bare loop of the same decoding, the same resize and one write) and the plain webdataset pipeline, all on the
same pictures and crops. They are the first of data.train, copied into temporary shards, as many as two for each worker.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from softmoe_train.bench.pictures import copy_pictures
from softmoe_train.bench.plain import Crop, PlainSamples, plain_batches
from softmoe_train.bench.rounds import Side, Spread, Timings, measure, no_reset
from softmoe_train.bench.settings import Measuring, StreamSettings
from softmoe_train.bench.table import Outcome, progress, ratio
from softmoe_train.data import Batch, Cursor, ImageStream, WebDatasetConfig, build_stream, check_data
from softmoe_train.data.decode import decode_image, open_image
from softmoe_train.data.keyed import Draws
from softmoe_train.data.order import Order
from softmoe_train.data.randaugment import rand_augment
from softmoe_train.data.records import InceptionCrop, RandAugment
from softmoe_train.data.stream import Positions, Share, TrainBatches, WebDatasetStream
from softmoe_train.data.transforms import inception_crop, reduction, sample_crop
from softmoe_train.faults.bad_steps import NONE_YET
from softmoe_train.loop import TrainState, batches_from
from softmoe_train.settings import RunConfig

READ, WHOLE, DECODE, LOOP = "read", "decode, whole", "decode", "bare loop"
STREAM, PLAIN, AUGMENT = "stream", "plain webdataset", "RandAugment"
TOLD = {
    READ: "bytes of pictures and labels",
    WHOLE: "bare decoding, all pixels",
    DECODE: "bare decoding as configured",
    LOOP: "that, the same resize, one write",
    STREAM: "the training stream",
    PLAIN: "Pillow and collation",
    AUGMENT: "which the others leave out",
}
_LONGER = 4  # through workers: a worker's batch takes as long as all of them together
_CALLS = 2000  # of what takes microseconds


class Job(NamedTuple):
    """A picture as it is stored, and what is cut out of it."""

    data: bytes
    key: str
    crop: Crop
    sample: int


def stream_problems(own: Measuring | None, config: RunConfig) -> list[str]:
    """Why there is no stream of pictures to measure."""
    data = config.data
    if not isinstance(data, WebDatasetConfig):
        return ["data=synthetic has no pictures to decode; give data=inception data.train=..."]
    problems = []
    if not isinstance(data.train_transform, InceptionCrop):
        problems.append(
            f"data.train_transform.kind={data.train_transform.kind}: the comparison is of random crops; use data=inception, or "
            f"transform@data.train_transform=inception_crop"
        )
    if data.workers < 1:
        problems.append("data.workers=0: the stream is measured through workers too; use 1 or more")
    if data.labels != "hard" or data.mixture is not None:
        problems.append("data.labels=multi_hot and data.mixture are not measured: use one set with one label a picture")
    if isinstance(own, StreamSettings):
        data = data.model_copy(update={"streams": math.gcd(data.streams, own.images)})
        problems += check_data(
            data, image_size=config.model.image_size, global_batch=own.images, world=1, needs_test=False
        )
    return problems


def bench_stream(settings: StreamSettings, config: RunConfig) -> Outcome:
    """Measure in this process, single-threaded as a decode worker is, and then through workers."""
    with tempfile.TemporaryDirectory() as folder, _threads(1), _cache_in(folder):
        data = copy_pictures(settings, config, Path(folder))
        size, seed = config.model.image_size, config.seed

        def stream(workers: int) -> WebDatasetStream:
            own = data.model_copy(update={"workers": workers})
            made = build_stream(
                own, image_size=size, num_classes=1, seed=seed, global_batch=settings.images, rank=0, world=1
            )
            return cast(WebDatasetStream, made)

        jobs = _jobs(stream(0), data, settings, seed)
        crops: dict[str, list[Crop]] = {}
        for job in jobs:
            crops.setdefault(job.key, []).append(job.crop)
        samples = PlainSamples(cast(list[str], data.train), crops, size)
        with progress(2 * (settings.rounds + settings.warmup), shown=True) as advance:
            alone = measure(
                _sides(stream(0), samples, jobs, data, cast(WebDatasetConfig, config.data).randaugment, settings, size),
                device=torch.device("cpu"),
                rounds=settings.rounds,
                warmup=settings.warmup,
                after=lambda: advance("one process"),
            )
            spread = _through_workers(
                {
                    STREAM: lambda: iter(stream(data.workers)),
                    PLAIN: lambda: plain_batches(samples, settings.images, data.workers, data.prefetch),
                },
                settings,
                data.workers,
                after=lambda: advance(f"{data.workers} workers"),
            )
        cost = {"loop": _cost_in_loop(settings), "order": _cost_of_order(stream(0), settings)}
    return _outcome(settings, data, jobs, alone, spread, cost, size)


def _sides(
    stream: WebDatasetStream,
    samples: PlainSamples,
    jobs: list[Job],
    data: WebDatasetConfig,
    augment: RandAugment | None,
    settings: StreamSettings,
    size: int,
) -> list[Side]:
    """What is timed in one process: each has a round's pictures."""
    cfg = cast(InceptionCrop, data.train_transform)
    reader = stream.pictures.reader
    stored = stream.order.locate(np.arange(len(jobs)))

    def read() -> None:
        for shard, index in zip(*stored, strict=True):
            reader.stored(shard, index)

    def whole() -> None:
        for job in jobs:
            decode_image(job.data, max_pixels=data.max_pixels)

    def decode() -> None:
        for job in jobs:
            by = reduction(job.crop.height, job.crop.width, size) if stream.pictures.scaled_decode else 1
            open_image(job.data, max_pixels=data.max_pixels).reduced(by)

    def loop() -> None:
        for begin in range(0, len(jobs), settings.images):
            out = torch.empty((settings.images, 3, size, size), dtype=torch.uint8)
            for at, job in enumerate(jobs[begin : begin + settings.images]):
                picture = open_image(job.data, max_pixels=data.max_pixels)
                inception_crop(
                    picture, out[at].numpy(), job.crop[:4], job.crop.mirrored, cfg, stream.pictures.scaled_decode
                )

    def ours() -> None:
        for _ in islice(stream, settings.batches):
            pass

    def plain() -> None:
        for _ in islice(plain_batches(samples, settings.images, 0, data.prefetch), settings.batches):
            pass

    runs = {READ: read, WHOLE: whole, DECODE: decode, LOOP: loop, STREAM: ours, PLAIN: plain}
    if augment is not None:
        square = np.ascontiguousarray(next(iter(stream)).images[0].permute(1, 2, 0).numpy())

        def augmented() -> None:
            for job in jobs:
                rand_augment(square, augment, Draws(0, job.sample, "randaugment"))

        runs[AUGMENT] = augmented
    return [Side(name, run, no_reset) for name, run in runs.items()]


def _through_workers(
    makers: dict[str, Callable[[], Iterator[Any]]], settings: StreamSettings, workers: int, after: Callable[[], object]
) -> Timings:
    """Seconds of four rounds' batches for each worker, after the first of each: what waits in queues is the same for both."""
    batches = _LONGER * settings.batches * workers
    timings = Timings({name: [] for name in makers}, {name: [] for name in makers})
    for i in range(settings.warmup + settings.rounds):
        for name in makers if i % 2 == 0 else reversed(makers):
            source = makers[name]()
            for _ in islice(source, workers):
                pass
            begin = time.perf_counter()
            for _ in islice(source, batches):
                pass
            seconds = time.perf_counter() - begin
            if isinstance(source, Generator):
                source.close()
            del source  # ends its workers
            if i >= settings.warmup:
                timings.seconds[name].append(seconds)
        after()
    return timings


def _cost_in_loop(settings: StreamSettings) -> float:
    """Seconds that the training loop spends on the position for each batch: its own iteration around a stream whose batches are there."""
    nothing = torch.empty(0)
    batch = Batch(nothing, nothing, nothing, nothing, Cursor(0), ())

    class Ready:
        def seek(self, cursor: Cursor) -> None:
            self.start = cursor.position

        def __iter__(self) -> Iterator[Batch]:
            for position in Positions(self.start, settings.images):
                yield replace(batch, cursor=Cursor(position + settings.images))

    def positioned() -> None:
        state = cast(TrainState, SimpleNamespace(cursor=Cursor(0), bad_steps=NONE_YET))
        for each in islice(batches_from(state, cast(ImageStream, Ready())), _CALLS):
            state.cursor = each.cursor

    def bare() -> None:
        for _ in range(_CALLS):
            replace(batch, cursor=batch.cursor)

    sides = [Side("positioned", positioned, no_reset), Side("bare", bare, no_reset)]
    timings = measure(sides, device=torch.device("cpu"), rounds=settings.rounds, warmup=settings.warmup)
    return timings.difference("positioned", "bare").median / _CALLS


def _cost_of_order(stream: WebDatasetStream, settings: StreamSettings) -> float:
    """Seconds that a worker spends for each batch on what belongs into it, going on from batch to batch of a million samples."""
    own = cast(Order, stream.order)
    order = Order([10_000] * 100, streams=own.streams, window=own.window, block=own.block, seed=own.seed)
    batches = TrainBatches(stream.pictures, order, Share(settings.images, own.streams, 0, 1), None)
    seconds = []
    for i in range(settings.warmup + settings.rounds):
        begin = time.perf_counter()
        for position in range(i * 64 * settings.images, (i + 1) * 64 * settings.images, settings.images):
            batches.located(position)
        seconds.append((time.perf_counter() - begin) / 64)
    return statistics.median(seconds[settings.warmup :])


def _jobs(stream: WebDatasetStream, data: WebDatasetConfig, settings: StreamSettings, seed: int) -> list[Job]:
    """A round's pictures in the stream's order, with the stream's own crops."""
    cfg, reader, jobs = cast(InceptionCrop, data.train_transform), stream.pictures.reader, []
    for sample in range(settings.images * settings.batches):
        shard, index = (int(part[0]) for part in stream.order.locate(np.asarray([sample])))
        image = reader.stored(shard, index)[0]
        picture, draws = open_image(image, max_pixels=data.max_pixels), Draws(seed, sample, "augment")
        box = sample_crop(picture.height, picture.width, cfg, draws)
        mirrored = cfg.flip and draws.uniform() < 0.5
        jobs.append(Job(image, reader.name(shard, index)[1], Crop(*box, mirrored), sample))
    return jobs


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Have the indexes of temporary shards go with them; data.train is indexed again."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def _outcome(
    settings: StreamSettings,
    data: WebDatasetConfig,
    jobs: list[Job],
    alone: Timings,
    spread: Timings,
    cost: dict[str, float],
    size: int,
) -> Outcome:
    sizes = [open_image(job.data, max_pixels=data.max_pixels) for job in jobs]
    pixels = statistics.mean(one.height * one.width for one in sizes)
    cfg = cast(InceptionCrop, data.train_transform)
    groups = [
        ("one process", alone, len(jobs)),
        (f"{data.workers} workers", spread, _LONGER * len(jobs) * data.workers),
    ]
    cells, rows = [], []
    for where, timings, images in groups:
        for name in timings.seconds:
            beside = name not in (READ, AUGMENT)
            ratios = {PLAIN: timings.ratio(PLAIN, name)} if beside else {}
            if beside and where == "one process":
                ratios |= {LOOP: timings.ratio(LOOP, name), WHOLE: timings.ratio(WHOLE, name)}
            rates = Spread.of([images / seconds for seconds in timings.seconds[name]])
            row = {
                "where": where,
                "side": name,
                "images": images,
                "images_per_second": rates._asdict(),
                "seconds_of_rounds": timings.seconds[name],
                "ratios": {other: value._asdict() for other, value in ratios.items()},
            }
            if timings.cpu_seconds[name]:
                row["cpu_ratios"] = {other: timings.cpu_ratio(other, name)._asdict() for other in ratios}
                row["cpu_seconds_of_rounds"] = timings.cpu_seconds[name]
            rows.append(row)
            shown = [ratio(ratios[other]) if other in ratios else "" for other in (PLAIN, LOOP, WHOLE)]
            cells.append(
                [where, name, f"{rates.median:,.0f} ({rates.low:,.0f} - {rates.high:,.0f})", *shown, TOLD[name]]
            )
    rows.append({"position_seconds": cost})
    return Outcome(
        title=f"training stream to {size} px, {settings.images} images a batch: JPEGs of {pixels / 1e6:.2f} megapixels on average, "
        f"scaled_decode {'on' if data.scaled_decode else 'off'}, resize in {cfg.arithmetic}",
        columns=["in", "what", "images/s", "x plain", "x bare loop", "x bare decoding", ""],
        cells=cells,
        notes=[
            f"median (quartiles) of {settings.rounds} interleaved rounds of {len(jobs)} pictures, the same crops; x: images/s over the other's, "
            f"of each round by itself",
            f"the position costs {1e6 * cost['loop']:.1f} us a batch in the training loop, and {1e6 * cost['order']:.1f} us in a worker, which "
            f"works out what belongs into it",
        ],
        rows=rows,
    )
