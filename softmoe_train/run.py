"""This file owns the assembly of a run: every knob, what may not be combined, and the eight lines that build a training.

Read this file first, then loop.py, then model/moe.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from softmoe_train.checkpoint.folder import step_folders
from softmoe_train.checkpoint.store import CheckpointConfig, CheckpointStore
from softmoe_train.config import Record, load_yaml, save_yaml
from softmoe_train.data import (
    Cursor,
    DataConfig,
    ImageStream,
    build_eval_stream,
    build_stream,
    check_data,
    make_indexes,
)
from softmoe_train.dist import World, control_group, pick_device, process_group, wait_for_all
from softmoe_train.engine.torch_engine import TorchEngine, build_torch_engine
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.loop import Evaluator, Plan, TrainState, fit
from softmoe_train.model.loss import LossKind
from softmoe_train.model.moe import moe_blocks
from softmoe_train.model.vit import ModelConfig, build_model
from softmoe_train.observe.log import ObserveConfig, SilentLog, build_log
from softmoe_train.observe.redact import without_secrets
from softmoe_train.optim.build import OptimConfig
from softmoe_train.optim.schedule import ScheduleConfig, learning_rate, schedule_problems
from softmoe_train.parallel.topology import ParallelConfig, Topology, expert_axis_problems

Positive = Annotated[int, Field(ge=1)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EngineConfig(Record):
    """Which engine holds the weights."""

    kind: Literal["torch"]


class EvalsConfig(Record):
    """The evaluators of a run; null leaves one out."""

    upstream: UpstreamConfig | None


class RunConfig(Record):
    """Every knob of a run; `conf/` holds the values."""

    name: str
    run_dir: str
    seed: Annotated[int, Field(ge=0)]
    steps: Positive  # updates of the whole run
    stop_after: Positive | None  # end cleanly after this step, as an interruption would
    batch_size: Positive  # images of one step, over all ranks
    micro_batches: Positive  # parts of a rank's images that go through the model one after another
    processes: Positive  # local workers to start; under torchrun or srun the launcher decides
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]  # of gathered weights and activations; stored weights are float32
    loss: LossKind
    allow_changes: bool  # continue a run although settings that shape its trajectory have changed
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    observe: ObserveConfig
    evals: EvalsConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir)


# What a continued run may change freely: where and how it computes, what it reports. All else shapes the numbers.
FREE = {
    "name", "run_dir", "stop_after", "micro_batches", "processes", "device", "allow_changes", "parallel", "engine",
    "checkpoint", "observe", "evals", "data.train", "data.test", "data.workers", "data.prefetch", "data.max_broken",
}  # fmt: skip


def check(config: RunConfig, size: int) -> list[str]:
    """Every mistake in the combination of settings for a run on `size` ranks; looks at files but starts nothing."""
    problems = expert_axis_problems(config.parallel, num_experts=config.model.moe.num_experts, size=size)
    problems += schedule_problems(config.schedule, config.steps)
    problems += check_data(
        config.data,
        image_size=config.model.image_size,
        global_batch=config.batch_size,
        world=size,
        needs_test=config.evals.upstream is not None,
    )
    if config.batch_size % size == 0 and config.batch_size // size % config.micro_batches:
        problems.append(
            f"micro_batches={config.micro_batches} does not divide the {config.batch_size // size} images that each of {size} "
            f"ranks has of batch_size={config.batch_size}; use a divisor, or a batch_size that is a multiple of "
            f"{size * config.micro_batches}"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
    return problems + _resume_problems(config)


def train(config: RunConfig, world: World) -> str:
    """Train, or continue what the run folder holds, as one rank of `world`; returns why it ended."""
    device = pick_device(config.device, world.local_rank)
    with process_group(world, device):
        topology = Topology.build(
            config.parallel, num_experts=config.model.moe.num_experts, device=device, size=world.size
        )
        engine = _engine(config, topology, device)
        _index(config, world)
        stream = _stream(config, world)
        evaluators = _evaluators(config, world)
        state = TrainState(engine, step=0, images_seen=0, cursor=Cursor(0), wandb_id="")
        store = _store(config, world)
        resumed = _resume(config, state, store, stream)
        log = _log(config, world, state, resumed=resumed)
        log.message(_description(config, engine, topology))
        reason = "failed"
        try:
            reason = fit(state, _plan(config, stream), stream, evaluators, store, log)
        except BaseException as error:
            reason = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            log.close(reason, failed=reason.startswith("failed"))
    return reason


def _engine(config: RunConfig, topology: Topology, device: torch.device) -> TorchEngine:
    match config.engine.kind:
        case "torch":
            return build_torch_engine(
                build_model(config.model, DTYPES[config.precision]),
                optim=config.optim,
                parallel=config.parallel,
                topology=topology,
                loss=config.loss,
                global_batch=config.batch_size,
                seed=config.seed,
                device=device,
            )


def _index(config: RunConfig, world: World) -> None:
    """Have the ranks of each host share the reading of tars that no run has met before."""
    make_indexes(
        config.data,
        part=world.local_rank % world.local_size,
        parts=world.local_size,
        needs_test=config.evals.upstream is not None,
    )
    wait_for_all()


def _stream(config: RunConfig, world: World) -> ImageStream:
    return build_stream(
        config.data,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        seed=config.seed,
        global_batch=config.batch_size,
        rank=world.rank,
        world=world.size,
    )


def _evaluators(config: RunConfig, world: World) -> dict[str, Evaluator]:
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
        evaluators["upstream"] = UpstreamEvaluator(config.evals.upstream, batches, config.loss)
    return evaluators


def _store(config: RunConfig, world: World) -> CheckpointStore:
    return CheckpointStore(
        config.folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        rank=world.rank,
        world=world.size,
        group=control_group(world),
    )


def _resume(config: RunConfig, state: TrainState, store: CheckpointStore, stream: ImageStream) -> Path | None:
    """Fill `state`; returns the checkpoint it came from. Precedence:

    1. the newest complete checkpoint of this run folder
    2. scratch: the weights that `initialize` derived from the seed
    """
    path = store.latest()
    if path is None:
        return None
    documents = store.read_documents(path)
    if documents["stream"] != stream.fingerprint() and not config.allow_changes:
        raise ValueError(
            f"data.train gives other samples than {path} was trained on: {stream.fingerprint()} now, {documents['stream']} then; "
            f"give the same shards, another run_dir, or allow_changes=true"
        )
    tensors = state.engine.state_dict()
    store.load(path, tensors)
    state.engine.load_state_dict(tensors)
    state.restore(documents["loop"])
    return path


def _log(config: RunConfig, world: World, state: TrainState, *, resumed: Path | None) -> SilentLog:
    tree = without_secrets(config.model_dump())
    if world.main:
        config.folder.mkdir(parents=True, exist_ok=True)
        save_yaml(tree, config.folder / "config.yaml")
    log = build_log(
        config.observe,
        config.folder,
        name=config.name,
        run_config=tree,
        total_steps=config.steps,
        main=world.main,
        wandb_id=state.wandb_id or None,
        resume_step=state.step,
    )
    state.wandb_id = log.wandb_id
    if resumed is not None:
        log.message(f"resumed from {resumed} at step {state.step} of {config.steps}")
    return log


def _description(config: RunConfig, engine: TorchEngine, topology: Topology) -> str:
    """What is about to be trained, in a line."""
    parameters = sum(p.numel() for p in engine.parameters.values())
    moe = config.model.moe
    layers = len(moe_blocks(moe.blocks, config.model.depth))
    experts = f"{moe.num_experts} experts x {moe.slots_per_expert} slots in {layers} blocks" if layers else "no experts"
    layout = f"expert axis {topology.ep.size()}, {config.parallel.sharding}"
    ranks = "1 process" if topology.size == 1 else f"{topology.size} processes, {layout}"
    return f"{parameters:,} parameters, {experts}; {ranks}; {engine.device.type}, {config.precision}"


def _plan(config: RunConfig, stream: ImageStream) -> Plan:
    return Plan(
        steps=config.steps,
        stop_after=config.stop_after,
        micro_batches=config.micro_batches,
        learning_rate=lambda step: learning_rate(config.schedule, step, config.steps),
        report_every=config.observe.every,
        save_every=config.checkpoint.every,
        documents={"config": without_secrets(config.model_dump()), "stream": stream.fingerprint()},
    )


def _resume_problems(config: RunConfig) -> list[str]:
    """Settings that shape the numbers and differ from those of the run that this folder holds."""
    before = config.folder / "config.yaml"
    if config.allow_changes or not before.is_file() or not step_folders(config.folder / "checkpoints", complete=True):
        return []
    then, now = _flat(load_yaml(before)), _flat(without_secrets(config.model_dump()))
    free = tuple(f"{key}." for key in FREE)
    changed = [
        f"{key}={now.get(key)} (was {then.get(key)})"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and key not in FREE and not key.startswith(free)
    ]
    if not changed:
        return []
    return [
        f"run_dir={config.run_dir} holds a run with other settings: {', '.join(changed)}; give another run_dir, the same "
        f"settings, or allow_changes=true to continue from its weights all the same"
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
