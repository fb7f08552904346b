"""This file owns the settings of a run: every knob, what may not be combined, and what may not change under a run."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from softmoe_train.changes import changed_settings
from softmoe_train.checkpoint.agreement import CheckpointError, DamagedError
from softmoe_train.checkpoint.best import metric_of
from softmoe_train.checkpoint.folder import checkpoints_of, step_folders, step_of
from softmoe_train.checkpoint.remote import Place, RemotePath, place_of
from softmoe_train.checkpoint.saver import RETRY_SECONDS
from softmoe_train.checkpoint.store import CheckpointConfig, read_documents
from softmoe_train.config import Record
from softmoe_train.data import DataConfig, SyntheticConfig, check_data, check_labels
from softmoe_train.engine.deepspeed_config import Decided, DeepSpeedConfig, deepspeed_problems, frozen_experts_problems
from softmoe_train.evals.finetune import FinetunesAtEnd
from softmoe_train.evals.measures import measures_of
from softmoe_train.evals.on_sets import feature_problems
from softmoe_train.evals.settings import EvalsConfig, set_problems
from softmoe_train.faults.bad_steps import BadStepsConfig
from softmoe_train.faults.claim import owner
from softmoe_train.model.loss import LossKind
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.observe.log import ObserveConfig
from softmoe_train.optim.average import AverageConfig
from softmoe_train.optim.build import OptimConfig
from softmoe_train.optim.groups import frozen_problems
from softmoe_train.optim.schedule import ScheduleConfig, schedule_problems
from softmoe_train.parallel.layout import ParallelConfig, chunk_problems, layout_problems, listed
from softmoe_train.redact import without_secrets
from softmoe_train.stores import driver_problem
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.start import warm_problems

Positive = Annotated[int, Field(ge=1)]
Minutes = Annotated[float, Field(gt=0)]


BROKEN_FILE = "broken_samples.jsonl"  # of a run folder


class TorchEngineConfig(Record):
    """Plain PyTorch: replicated or FSDP2 weights."""

    kind: Literal["torch"]


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedConfig, Field(discriminator="kind")]


class RunConfig(Record):
    """Every knob of a run; `conf/` holds the values."""

    name: str
    run_dir: str
    seed: Annotated[int, Field(ge=0)]
    steps: Positive  # updates of the whole run
    stop_after: Positive | None  # end cleanly after this step, as an interruption would
    time_limit: Minutes | None  # from its start, after which this process saves and ends, to be resumed
    hang_limit: Minutes | None  # without a finished step or evaluation batch, after which the run ends and shows why
    preflight: bool  # before the first step every rank is measured, and what does not fit is told
    batch_size: Positive  # images of one step, over all ranks
    micro_batches: Positive  # parts of a rank's images that go through the model one after another
    processes: Positive  # local workers to start; under torchrun or srun the launcher decides
    elastic: bool  # under torchrun's restarts: train on the largest legal world, the other ranks wait as spares
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]  # of gathered weights and activations; stored weights are float32
    compile: bool  # each block by torch.compile: minutes at the start, fewer kernels after
    loss: LossKind
    allow_changes: bool  # continue a run although settings that shape its trajectory have changed
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    average: AverageConfig | None
    warm: WarmConfig | None  # weights to start from, where the run has no checkpoint yet
    schedule: ScheduleConfig
    parallel: ParallelConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    bad_steps: BadStepsConfig
    observe: ObserveConfig
    evals: EvalsConfig
    finetune: FinetunesAtEnd  # by name: at the end of the run, in the same processes

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str) -> str:
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(
                f"name={name!r} must be a plain name, since runs/<name> is the run's folder; use run_dir= for a path"
            )
        return name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir)

    @property
    def checkpoints(self) -> Place:
        """Where its checkpoints are: in the run folder unless the settings say otherwise."""
        return self.folder / "checkpoints" if self.checkpoint.folder is None else place_of(self.checkpoint.folder)

    @property
    def claimed_apart(self) -> Path | None:
        """The folder of the checkpoints where it needs a claim of its own: on a disk, and not in the run folder."""
        apart = self.checkpoint.folder is not None and isinstance(self.checkpoints, Path)
        return self.checkpoints if apart and self.checkpoints != self.folder else None  # pyright: ignore[reportReturnType]

    def as_saved(self) -> dict[str, Any]:
        """The configuration as it is kept and sent: secrets and signed URLs left out."""
        return without_secrets(self.model_dump())


def _retry_problems(config: RunConfig) -> list[str]:
    """Why the tries of a last save would look like a hang."""
    seconds = (config.checkpoint.max_failures - 1) * RETRY_SECONDS
    if config.hang_limit is None or 60 * config.hang_limit > 2 * seconds:
        return []
    return [
        f"hang_limit={config.hang_limit:g} with checkpoint.max_failures={config.checkpoint.max_failures}: a last save is tried again for "
        f"{seconds:.0f} s, which would look like a hang; use a hang_limit above {2 * seconds / 60:g} minutes, or fewer failures"
    ]


def _frozen_problems(config: RunConfig, size: int) -> list[str]:
    """Why nothing, or everything, would be frozen."""
    if not config.optim.frozen:
        return []
    names = [name for name, _ in build_model(config.model, torch.float32).named_parameters()]
    problems = frozen_problems(config.optim.frozen, names)
    if isinstance(config.engine, DeepSpeedConfig):
        problems += frozen_experts_problems(decided(config, config.engine, size), config.model.num_experts, names)
    return problems


def check(config: RunConfig, size: int, local_size: int) -> list[str]:
    """Every mistake in the combination of settings for a run on `size` ranks, `local_size` of them on a host.

    Looks at files but starts nothing.
    """
    problems = compute_problems(config, size, local_size)
    problems += schedule_problems(config.schedule, config.steps)
    problems += _best_problems(config) + _retry_problems(config) + _frozen_problems(config, size)
    if config.bad_steps.then == "rollback" and config.checkpoint.keep_last == 1:
        problems.append(
            "bad_steps.then=rollback with checkpoint.keep_last=1: a run that is interrupted in the middle of bad steps would keep no "
            "checkpoint from before them; use 2"
        )
    if config.data.mixup is not None and config.data.labels == "multi_hot" and config.loss == "softmax":
        problems.append(
            f"data.mixup={config.data.mixup} with data.labels=multi_hot and loss=softmax: the loss shares an image among its labels, so of "
            f"two mixed images the one with more labels would count for more than its part; use loss=sigmoid, or data.mixup=null"
        )
    problems += check_data(
        config.data,
        image_size=config.model.image_size,
        global_batch=config.batch_size,
        world=size,
        needs_test=config.evals.reads_test(config.model),
    )
    problems += label_problems(config) + set_problems(config.evals, config.data, config.model)
    problems += feature_problems(config.evals.on_sets, config.model.image_size)
    return problems + (_folder_problems(config) or _resume_problems(config))


def label_problems(config: RunConfig) -> list[str]:
    """Why the labels of the data are not those of the model, or of a loss."""
    if isinstance(config.data, SyntheticConfig):
        return []
    if config.data.labels == "none":
        return [
            "data.labels=none: every loss of `softmoe train` is of labels; use hard or multi_hot (pairs without labels are for programs "
            "that read them through softmoe_train.data)"
        ]
    problems = check_labels(config.data, config.model.num_classes)
    quarantine = config.data.quarantine
    if quarantine is not None and os.path.realpath(quarantine) == os.path.realpath(config.folder / BROKEN_FILE):
        problems.append(
            f"data.quarantine={quarantine} is a file that this run itself writes, and it decides the order of its samples; copy it to another "
            f"place, and name that"
        )
    return problems


def compute_problems(config: RunConfig, size: int, local_size: int) -> list[str]:
    """The mistakes that have nothing to do with files: layout, micro-batches, device, engine."""
    experts = config.model.num_experts
    # Of several hosts each knows its own ranks only: one would refuse alone. `run.build_topology` judges when all have told.
    on_host = local_size if local_size == size else None
    problems = layout_problems(config.parallel, num_experts=experts, size=size, local_size=on_host)
    if config.batch_size % size == 0 and config.batch_size // size % config.micro_batches:
        problems.append(
            f"micro_batches={config.micro_batches} does not divide the {config.batch_size // size} images that each of {size} "
            f"ranks has of batch_size={config.batch_size}; use a divisor, or a batch_size that is a multiple of "
            f"{size * config.micro_batches}"
        )
    elif config.batch_size % size == 0 and not problems:
        images = config.batch_size // (size * config.micro_batches)
        n = config.model.group_images
        if images % n == 0:
            problems += chunk_problems(config.parallel, num_experts=experts, size=size, images=images, group_images=n)
    problems += _group_problems(config, size) + _void_problems(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
    if isinstance(config.engine, DeepSpeedConfig):
        problems += deepspeed_problems(decided(config, config.engine, size))
    return problems


def _group_problems(config: RunConfig, size: int) -> list[str]:
    """Why routing groups of several images would not be runs of consecutive global samples, whole in one micro-batch."""
    n, problems = config.model.group_images, []
    key = f"model.moe.sparse.group_images={n}"
    parts = size * config.micro_batches
    batch, streams = config.batch_size, config.data.streams
    evaluated = {"upstream": config.evals.upstream, "finetune": config.evals.finetune, **config.evals.on_sets}
    sizes = {f"evals.{source}.batch_size": one.batch_size for source, one in evaluated.items() if one is not None}
    # What does not divide into ranks is refused for that, whatever the groups.
    of_batch = batch // parts if batch % parts == 0 else n
    of_streams = streams // size if streams % size == 0 else n
    legal = math.gcd(of_batch, of_streams, *sizes.values())
    use = f"use {listed([d for d in range(1, legal + 1) if legal % d == 0])}"
    if of_batch % n:
        problems.append(
            f"{key} does not divide the {of_batch} images of a micro-batch on each of {size} ranks; {use}, or a batch_size that is a "
            f"multiple of {parts * n}"
        )
    if of_streams % n:
        problems.append(
            f"{key} does not divide the {of_streams} consecutive samples that each of {size} ranks has of data.streams={streams}; {use}, or "
            f"streams that are a multiple of {size * n}"
        )
    return problems + [
        f"{key} does not divide {where}={size}; {use}, or a multiple of {n} there"
        for where, size in sizes.items()
        if size % n
    ]


def _void_problems(config: RunConfig) -> list[str]:
    """What would train nothing, or change nothing, beside the run's other settings."""
    problems, parallel = [], config.parallel
    if config.loss == "softmax" and config.model.num_classes == 1:
        problems.append(
            "loss=softmax with model.num_classes=1: the loss of one class is 0 whatever the model says; use loss=sigmoid, or more classes"
        )
    if parallel.recompute == "moe" and not config.model.has_experts:
        problems.append(
            "parallel.recompute=moe: no block of this model holds experts (model.moe.blocks); use none or block"
        )
    if parallel.exchange_dtype is not None and not config.model.has_experts:
        problems.append(
            f"parallel.exchange_dtype={parallel.exchange_dtype}: no block of this model holds experts (model.moe.blocks), so there "
            f"are no slots to round; use null"
        )
    elif parallel.exchange_dtype == config.precision:
        problems.append(
            f"parallel.exchange_dtype={parallel.exchange_dtype} with precision={config.precision}: slots are in it already; use null"
        )
    if parallel.reduce_each_micro and config.micro_batches == 1:
        problems.append(
            "parallel.reduce_each_micro=true with micro_batches=1: there is one sum either way; use false, or more micro_batches"
        )
    return problems


def _best_problems(config: RunConfig) -> list[str]:
    """Why no checkpoint could ever be the best."""
    best = config.checkpoint.best
    if best is None:
        return []
    averaged, held_out = config.average is not None, config.data.holdout is not None
    known = measures_of(config.evals, config.model.num_classes, averaged=averaged, held_out=held_out)
    if metric_of(best) not in known:
        some = ", ".join(list(known)[:24])
        remedy = f"use one of {some}" if known else "no evaluator is on (evals=[upstream]); use null"
        return [f"checkpoint.best={best}: nothing measures {metric_of(best)}; {remedy}"]
    source, steps = known[metric_of(best)]
    if not 0 < math.lcm(steps, config.checkpoint.every) < config.steps:
        return [
            f"checkpoint.best={best}: it is measured every {steps} steps and checkpoints are made every "
            f"{config.checkpoint.every} (0: only at the end), so no step before the last of steps={config.steps} has both; use "
            f"evals.{source}.every and checkpoint.every that meet, or null"
        ]
    return []


def decided(config: RunConfig, engine: DeepSpeedConfig, size: int) -> Decided:
    """What the settings of a run on `size` ranks decide of DeepSpeed's own."""
    return Decided(
        engine=engine,
        optim=config.optim,
        schedule=config.schedule,
        parallel=config.parallel,
        precision=config.precision,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        size=size,
    )


def _folder_problems(config: RunConfig) -> list[str]:
    """Why the run folder, or that of the checkpoints, cannot be written by this run."""
    if not config.run_dir:
        return ["run_dir is empty; give the run a folder, as in run_dir=runs/mine"]
    if "://" in config.run_dir:
        return [
            f"run_dir={without_secrets(config.run_dir)} is a URL; give a folder, and checkpoint.folder=URL to have the checkpoints there"
        ]
    there = _in_the_way(config.folder)
    if there is not None:
        return [f"run_dir={config.run_dir}: {there} is not a folder that we may write to; give another run_dir"]
    there = _in_the_way(config.checkpoints) if isinstance(config.checkpoints, Path) else None
    if there is not None:
        return [f"{_where(config)}: {there} is not a folder that we may write to; give another"]
    holder = owner(config.folder)
    if holder is not None:
        return [f"run_dir={config.run_dir} is in use by {holder}; wait for it to end or give another run_dir"]
    holder = None if config.claimed_apart is None else owner(config.claimed_apart)
    if holder is not None:
        return [f"{_where(config)} is in use by {holder}; wait for it to end or give another checkpoint.folder"]
    return []


def _in_the_way(folder: Path) -> Path | None:
    """What we may not write to where `folder` is, or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return None if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else folder


def _where(config: RunConfig) -> str:
    """The setting that says where the checkpoints are."""
    folder = config.checkpoint.folder
    return f"run_dir={config.run_dir}" if folder is None else f"checkpoint.folder={folder}"


def _resume_problems(config: RunConfig) -> list[str]:
    """What in the newest checkpoint that can be read does not go with these settings, or why none is found that there is."""
    where = _where(config)
    another = f"give another {where.partition('=')[0]}"
    driver = driver_problem(str(config.checkpoints))
    if driver is not None:
        return [f"{where}: {driver}"]
    try:
        path, saved = _newest_config(config.checkpoints)
        missing = _missing_problems(config) if path is None else []
    except CheckpointError as error:
        return [f"{where}: {error}"]
    except OSError as error:
        return [f"{where} cannot be read: {error}; mend that, or {another}"]
    if path is None:
        # The source is read, and needed, only where the run has no checkpoint of its own.
        return missing or ([] if config.warm is None else warm_problems(config.warm, config.model, config.seed))
    assert isinstance(saved, dict), saved
    problems = []
    if step_of(path) > config.steps:
        problems.append(
            f"steps={config.steps}: {where} is at step {step_of(path)} already; give more steps or {another.removeprefix('give ')}"
        )
    changed = changed_settings(saved, config.as_saved())
    if changed and not config.allow_changes:
        problems.append(
            f"{where} holds a run with other settings: {', '.join(changed)}; {another}, the same settings, or allow_changes=true "
            f"to continue it with these"
        )
    return problems


def _missing_problems(config: RunConfig) -> list[str]:
    """Why a run without a checkpoint where its settings look for one must not start from scratch."""
    folder, before = config.checkpoints, checkpoints_of(config.folder)
    if isinstance(folder, RemotePath) and folder.lacks_bucket():
        return [f"{_where(config)}: the store says that there is no such bucket; make it, or check the name"]
    if before != folder and step_folders(before, complete=True):
        return [
            f"{_where(config)}: there is no checkpoint, but run_dir={config.run_dir} has some in {before}; copy them there, go on with "
            f"checkpoint.folder={before}, or give another run_dir"
        ]
    return []


def _newest_config(folder: Place) -> tuple[Place | None, object]:
    """The newest checkpoint whose JSON is whole, and its configuration: the run sets aside what is damaged before it."""
    for path in reversed(step_folders(folder, complete=True)):
        try:
            return path, read_documents(path)["config"]
        except DamagedError:
            continue
    return None, None
