"""This file owns `bench step`: a training step of the user's own run, as images per second, utilisation and its parts.

The parts are differences between calls that do more and more of a step, in interleaved rounds: nothing inside the engine
waits for the clock.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from softmoe_train.bench.exchange_clock import ExchangeClock, TimedExchange, moe_layers
from softmoe_train.bench.flops import multiplies, peak_product
from softmoe_train.bench.rounds import Side, Spread, Timings, measure, no_reset
from softmoe_train.bench.settings import Measuring, StepSettings
from softmoe_train.bench.table import Outcome, milliseconds, progress, ratio
from softmoe_train.config import ConfigError
from softmoe_train.data import Batch, Cursor, check_data, make_indexes
from softmoe_train.dist import World, gather_over_world, gather_texts
from softmoe_train.engine.protocol import Engine
from softmoe_train.loop import train_step
from softmoe_train.model.count import training_flops
from softmoe_train.parallel.topology import Topology
from softmoe_train.run import DTYPES, build_engine, build_topology, training_stream
from softmoe_train.settings import RunConfig

LR = 0.0  # weights stay, the arithmetic is the same


class Parts(NamedTuple):
    """Seconds of a step by what it does, and what else is told of it."""

    data: Spread
    forward: Spread
    backward: Spread
    exchange: Spread
    reduce: Spread
    update: Spread
    step: Spread  # data included
    utilisation: Spread  # the step's model FLOPs a second, over those of the bare product
    peak: Spread  # FLOPs a second of the bare product, on this rank


def step_problems(own: Measuring | None, config: RunConfig, size: int) -> list[str]:
    """What is wrong with the batches of a step on `size` ranks."""
    if isinstance(own, StepSettings) and own.batches == "stream":
        image_size = config.model.image_size
        return check_data(
            config.data, image_size=image_size, global_batch=config.batch_size, world=size, needs_test=False
        )
    if config.batch_size % size:
        return [f"batch_size={config.batch_size} does not divide into {size} ranks; use a multiple of {size}"]
    return []


def bench_step(settings: StepSettings, config: RunConfig, world: World, device: torch.device) -> Outcome:
    """Measure on every rank of the default process group; every rank returns the same outcome."""
    topology = build_topology(config, world, device)
    engine = build_engine(config, topology, device)
    rehearsal = Rehearsal(
        engine, config, _batches(settings, config, world, device), travels=topology.ep.size() > 1 and not config.compile
    )
    with progress(settings.rounds + settings.warmup, shown=world.main) as advance:
        timings = measure(
            rehearsal.sides(),
            device=device,
            rounds=settings.rounds,
            warmup=settings.warmup,
            ready=dist.barrier,
            after=lambda: advance("step"),
        )
    parts = rehearsal.parts(timings, settings.warmup, images=config.batch_size // world.size)
    return _outcome(_mean_over_ranks(parts, device), settings, config, topology)


class Rehearsal:
    """The same step again and again, whole and in parts."""

    def __init__(self, engine: Engine, config: RunConfig, batches: Iterator[Batch], *, travels: bool) -> None:
        self.engine = engine
        self.config = config
        self.batches = batches
        self.batch = next(batches).to(engine.device)
        self.layers = moe_layers(engine.module) if travels else []
        self.plain = [layer.exchange for layer in self.layers]
        self.clock = ExchangeClock(engine.device)
        self.travel: dict[str, list[float]] = {"forward": [], "backward": []}
        self.product, self.product_flops = peak_product(DTYPES[config.precision], engine.device)

    def sides(self) -> list[Side]:
        """Each does what the one before it does, and more."""
        return [
            Side("product", self.product, no_reset),
            Side("data", self._data, no_reset),
            Side("forward", self._forward, lambda: self._read("forward")),
            Side("backward", self._forward_backward, self._forget_unsummed),
            Side("reduce", self._reduce, self._forget_summed),
            Side("step", lambda: train_step(self.engine, self.batch, LR, self.config.micro_batches), no_reset),
        ]

    def parts(self, timings: Timings, warmup: int, *, images: int) -> Parts:
        """What the sides say about a step of `images` images on this rank."""
        seconds = timings.seconds
        out, both = (self.travel[name][warmup:] for name in ("forward", "backward"))
        rounds = range(len(both))
        step = [seconds["data"][i] + seconds["step"][i] for i in rounds]
        flops = images * training_flops(self.config.model)
        speed = [flops / s for s in step]
        peak = [self.product_flops / s for s in seconds["product"]]
        return Parts(
            data=timings.spread("data"),
            forward=Spread.of([seconds["forward"][i] - out[i] for i in rounds]),
            backward=Spread.of([seconds["backward"][i] - seconds["forward"][i] - both[i] + out[i] for i in rounds]),
            exchange=Spread.of(both),
            reduce=timings.difference("reduce", "backward"),
            update=timings.difference("step", "reduce"),
            step=Spread.of(step),
            utilisation=Spread.of([s / p for s, p in zip(speed, peak, strict=True)]),
            peak=Spread.of(peak),
        )

    def _data(self) -> None:
        self.batch = next(self.batches).to(self.engine.device)

    def _forward(self) -> None:
        self._time_exchange(True)
        for part in self.batch.split(self.config.micro_batches):
            self.engine.module(part.images)

    def _forward_backward(self) -> None:
        self._time_exchange(True)
        for part in self.batch.split(self.config.micro_batches):
            self.engine.forward_backward(part, last=False)

    def _reduce(self) -> None:
        parts = self.batch.split(self.config.micro_batches)
        for part in parts:
            self.engine.forward_backward(part, last=part is parts[-1])
        if self.config.engine.kind == "torch":  # DeepSpeed's are summed by then, and asking for them copies
            self.engine.gradients()

    def _forget_summed(self) -> None:
        match self.config.engine.kind:
            case "torch":
                self.engine.module.zero_grad()
            case "deepspeed":
                self.engine.update(LR)

    def _forget_unsummed(self) -> None:
        self._read("backward")
        # A sharded engine holds gradients that no rank has summed yet: a whole step takes them along.
        train_step(self.engine, self.batch, LR, self.config.micro_batches)

    def _read(self, name: str) -> None:
        self._time_exchange(False)
        self.travel[name].append(self.clock.read())

    def _time_exchange(self, on: bool) -> None:
        for layer, exchange in zip(self.layers, self.plain, strict=True):
            layer.exchange = TimedExchange(exchange, self.clock) if on else exchange


def _batches(settings: StepSettings, config: RunConfig, world: World, device: torch.device) -> Iterator[Batch]:
    match settings.batches:
        case "made":
            return itertools.repeat(_made(config, world))
        case "stream":
            part, parts = world.local_rank % world.local_size, world.local_size
            problems = gather_texts(make_indexes(config.data, part=part, parts=parts, needs_test=False))
            if problems:
                raise ConfigError(problems)
            return iter(training_stream(config, world, device))


def _made(config: RunConfig, world: World) -> Batch:
    """A batch of noise: what the pictures show changes no time."""
    images, side = config.batch_size // world.size, config.model.image_size
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    pictures = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, config.model.num_classes, (images,), generator=generator)
    return Batch(pictures, labels, torch.ones(images, dtype=torch.bool), torch.arange(images), Cursor(images), ())


def _mean_over_ranks(parts: Parts, device: torch.device) -> Parts:
    table = gather_over_world(torch.tensor(parts, dtype=torch.float64).to(device)).mean(0).tolist()
    return Parts(*(Spread(*row) for row in table))


def _outcome(parts: Parts, settings: StepSettings, config: RunConfig, topology: Topology) -> Outcome:
    rate = config.batch_size / parts.step.median
    shown = ("data", "forward", "backward", "exchange", "reduce", "update", "step")
    cells = [
        [name, milliseconds(getattr(parts, name)), f"{getattr(parts, name).median / parts.step.median:.0%}"]
        for name in shown
    ]
    many = f"{topology.size} ranks, expert axis {topology.ep.size()}, {config.parallel.sharding}"
    layout = "1 process" if topology.size == 1 else many
    row: dict[str, Any] = {
        "seconds": {name: getattr(parts, name)._asdict() for name in shown},
        "images_per_second": rate,
        "flops_per_image": training_flops(config.model),
        "utilisation": parts.utilisation._asdict(),
        "product_flops_per_second": parts.peak._asdict(),
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "precision": config.precision,
        "ranks": topology.size,
        "expert_axis": topology.ep.size(),
        "sharding": config.parallel.sharding,
        "engine": config.engine.kind,
    }
    return Outcome(
        title=f"step of {config.name}: {config.batch_size} images{_micro(config)}, {config.precision}; {layout}",
        columns=["part", "ms", "of the step"],
        cells=cells,
        notes=[
            f"{rate:,.1f} images/s; model FLOPs utilisation {ratio(parts.utilisation)} of a bare product's "
            f"{parts.peak.median / 1e9:,.0f} GFLOP/s a rank{_in_dtype(config, topology)}, measured in the same rounds on all ranks at once",
            f"median (quartiles) of {settings.rounds} interleaved rounds, mean over ranks; parts are differences, so they add up "
            "only about",
            *_overlap_notes(settings, config),
        ],
        rows=[row],
    )


def _micro(config: RunConfig) -> str:
    return "" if config.micro_batches == 1 else f" in {config.micro_batches} micro-batches"


def _in_dtype(config: RunConfig, topology: Topology) -> str:
    dtype = DTYPES[config.precision]
    native = multiplies(dtype, torch.device(topology.dp.device_type))
    return f" in {config.precision}" if native else f" in float32 (this processor cannot multiply {config.precision})"


def _overlap_notes(settings: StepSettings, config: RunConfig) -> list[str]:
    """What a part does not show because it runs under another."""
    notes = ["exchange is what is not hidden under the experts; reduce is what is not hidden under the backward"]
    if config.compile:
        notes[0] = "compile=true: the exchange cannot be told apart, it is in forward and backward"
    if config.parallel.sharding != "replicated":
        notes.append("the gathers of sharded weights are in forward and backward")
    if settings.batches == "made":
        notes.append("data is the copy of one made batch to the device; batches=stream measures the run's own data")
    return notes
