"""This file owns `softmoe bench`: what to measure, in which processes, and where the result goes."""

import re
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from softmoe_train.asked import dense_problems
from softmoe_train.bench.checkpoint import bench_checkpoint, checkpoint_problems
from softmoe_train.bench.exchange import bench_exchange, exchange_problems
from softmoe_train.bench.facts import facts_of, sentence_of, write_json
from softmoe_train.bench.infer import bench_infer, infer_problems
from softmoe_train.bench.layer_grid import bench_layer
from softmoe_train.bench.picture import draw_layers
from softmoe_train.bench.settings import (
    CheckpointSettings,
    ExchangeSettings,
    InferSettings,
    LayerSettings,
    Measuring,
    StepSettings,
    StreamSettings,
)
from softmoe_train.bench.step import bench_step, step_problems
from softmoe_train.bench.stream import bench_stream, stream_problems
from softmoe_train.bench.table import Outcome, print_outcome
from softmoe_train.commands.workers import Verb, ranks, run_verb, under_a_launcher
from softmoe_train.config import ConfigError, compose, compose_own, split_overrides
from softmoe_train.dist import World, pick_device, process_group
from softmoe_train.run import DTYPES
from softmoe_train.settings import RunConfig, compute_problems

M = TypeVar("M", bound=Measuring)
MEASURES = {
    "layer": "the MoE layer beside its bare matrix products, a dense MLP of equal FLOPs, and other people's layers",
    "infer": "images per second of a Soft MoE model beside the dense one of the same size",
    "step": "a training step of your own run: images per second, utilisation, and its parts",
    "exchange": "the slot exchange of your own run beside the bare collective of the same slots",
    "stream": "images per second of your training data by stage, beside bare decoding and the plain webdataset pipeline",
    "checkpoint": "how long a save holds your own run up, and saves and loads beside the disk",
}


INFERS = ("model", "precision", "device")  # what a forward of one process takes from a run


class Asked(NamedTuple, Generic[M]):
    """What to measure, of which run."""

    own: M
    run: RunConfig

    @property
    def processes(self) -> int:
        """Local workers to start."""
        return self.run.processes


def bench(what: str, overrides: list[str]) -> int:
    """Measure; raises ConfigError before anything is started."""
    match what:
        case "layer":
            return _layer(overrides)
        case "infer":
            return _infer(overrides)
        case "step":
            return _on_ranks(what, StepSettings, overrides)
        case "exchange":
            return _on_ranks(what, ExchangeSettings, overrides)
        case "stream":
            return _stream(overrides)
        case "checkpoint":
            return _on_ranks(what, CheckpointSettings, overrides)
    raise AssertionError(what)


def _layer(overrides: list[str]) -> int:
    settings, problems = compose_own(LayerSettings, "bench_layer.yaml", overrides)
    problems += _launcher_problems("layer")
    if settings is None or problems:
        raise ConfigError(problems)
    device = pick_device(settings.device, 0)
    outcome, rows = bench_layer(settings, device)
    facts = facts_of(device, ["layer", *overrides], 1)
    if settings.picture is not None:
        draw_layers(rows, settings.picture, sentence_of(facts))
    _tell("layer", settings, outcome, facts, settings.model_dump())
    return 0


def _infer(overrides: list[str]) -> int:
    asked = _compose("infer", InferSettings, overrides, None)
    device = pick_device(asked.run.device, 0)
    outcome = bench_infer(asked.own, asked.run.model, DTYPES[asked.run.precision], device)
    _tell("infer", asked.own, outcome, facts_of(device, ["infer", *overrides], 1), _told(asked))
    return 0


def _stream(overrides: list[str]) -> int:
    asked = _compose("stream", StreamSettings, overrides, None)
    outcome = bench_stream(asked.own, asked.run)
    _tell("stream", asked.own, outcome, facts_of(torch.device("cpu"), ["stream", *overrides], 1), _told(asked))
    return 0


def _on_ranks(what: str, record: type[M], overrides: list[str]) -> int:
    """Measure in as many processes as the run has."""
    verb = Verb(
        "bench",
        compose=lambda world: _compose(what, record, overrides, world),
        work=lambda asked, world: _measure(what, asked, overrides, world),
        interrupted=lambda _: f"{what} interrupted, nothing was measured",
    )
    return run_verb(verb, [what, *overrides])


def _measure(what: str, asked: Asked[M], overrides: list[str], world: World) -> int:
    device = pick_device(asked.run.device, world.local_rank)
    with process_group(world, device):
        match asked.own:
            case StepSettings() as settings:
                outcome = bench_step(settings, asked.run, world, device)
            case ExchangeSettings() as settings:
                outcome = bench_exchange(settings, asked.run, world, device)
            case CheckpointSettings() as settings:
                outcome = bench_checkpoint(settings, asked.run, world, device)
            case _:
                raise AssertionError(what)
    if world.main:
        _tell(what, asked.own, outcome, facts_of(device, [what, *overrides], world.size), _told(asked))
    return 0


def _compose(what: str, record: type[M], overrides: list[str], world: World | None) -> Asked[M]:
    """The measurement's own keys and the run's; ConfigError tells all mistakes in both."""
    ours, others = split_overrides(record, RunConfig, overrides)
    own, problems = compose_own(record, f"bench_{what}.yaml", ours)
    problems += [problem for override in others for problem in _void_problems(what, override)]
    try:
        run = compose(
            RunConfig,
            others,
            lambda c: _problems(what, own, c, *ranks(world, c)) + dense_problems(c.model, others),
        )
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems or own is None:
        raise ConfigError(problems)
    return Asked(own, run)


def _problems(what: str, own: Measuring | None, config: RunConfig, size: int, local_size: int) -> list[str]:
    """What is wrong with a run's settings for this measurement, which writes nothing into a run folder."""
    match what:
        case "infer":
            return infer_problems(own, config) + _launcher_problems(what)
        case "stream":
            return stream_problems(own, config) + _launcher_problems(what)
        case "step":
            return compute_problems(config, size, local_size) + step_problems(own, config, size)
        case "exchange":
            return compute_problems(config, size, local_size) or exchange_problems(own, config, size)
        case "checkpoint":
            return compute_problems(config, size, local_size) + checkpoint_problems()
    raise AssertionError(what)


def _void_problems(what: str, override: str) -> list[str]:
    """Why a setting of the run that a person wrote would change nothing that is measured (a recipe may set what it likes)."""
    key = override.partition("=")[0].lstrip("+~")
    field = re.split(r"[./@]", key)[0]
    if what == "infer" and field in RunConfig.model_fields and field not in INFERS:
        return [
            f"{override}: bench infer measures the forward of one process, not compiled: of a run's settings it has recipe, "
            f"{', '.join(INFERS)}; leave {key} out, or use bench step"
        ]
    if what == "exchange" and key == "compile":
        return [f"{override}: bench exchange runs no block of the model, so nothing is compiled; leave it out"]
    return []


def _launcher_problems(what: str) -> list[str]:
    return [f"bench {what} measures one process; start it without a launcher"] if under_a_launcher() else []


def _told(asked: Asked[M]) -> dict[str, Any]:
    return {**asked.own.model_dump(), "run": asked.run.as_saved()}


def _tell(what: str, measuring: Measuring, outcome: Outcome, facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """The table for people, JSON for programs."""
    print_outcome(outcome, sentence_of(facts))
    if measuring.out is not None:
        write_json(measuring.out, what, facts, settings, outcome.rows)
