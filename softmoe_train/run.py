"""This file owns the assembly of a run: the eight lines that build a training from its settings.

Read this file first, then loop.py, then model/moe.py.
"""

import gc
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch

from softmoe_train.at_end import child_of, is_complete, measured, tell_results
from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.folder import step_of
from softmoe_train.checkpoint.remote import Place, url_of
from softmoe_train.checkpoint.saver import Saver
from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.config import ConfigError
from softmoe_train.data import (
    Cursor,
    ImageStream,
    SyntheticConfig,
    build_stream,
    left_out,
    make_indexes,
)
from softmoe_train.dist import World, control_group, gather_over_world, gather_texts, pick_device, process_group
from softmoe_train.engine.deepspeed_config import DeepSpeedConfig
from softmoe_train.engine.deepspeed_engine import DeepSpeedEngine, build_deepspeed_engine, forget_groups
from softmoe_train.engine.torch_engine import TorchEngine, build_torch_engine
from softmoe_train.engine.weights import Materialise, with_values
from softmoe_train.evals.settings import upstream_sets
from softmoe_train.evaluators import build_evaluators, tell
from softmoe_train.faults.bad_batches import BadBatches
from softmoe_train.faults.bad_steps import BadData, BadStepsError
from softmoe_train.faults.broken import Budget
from softmoe_train.faults.claim import Claim, claim
from softmoe_train.faults.hang import watched
from softmoe_train.faults.stop import AgreedStop, agreed_stop
from softmoe_train.launching.preflight import About, Preflight
from softmoe_train.launching.progress import tell_progress
from softmoe_train.launching.worker import HUNG, RESUME
from softmoe_train.loop import Plan, TrainState, fit
from softmoe_train.model.records import moe_blocks
from softmoe_train.model.vit import build_model
from softmoe_train.observe.log import SilentLog
from softmoe_train.observe.startup import Startup
from softmoe_train.optim.schedule import learning_rate
from softmoe_train.parallel.layout import layout_problems
from softmoe_train.parallel.topology import Topology
from softmoe_train.resume import go_back, resume
from softmoe_train.run_log import log_of, open_log
from softmoe_train.settings import BROKEN_FILE, RunConfig, TorchEngineConfig, decided

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(config: RunConfig, world: World, startup: Startup | None = None) -> str:
    """Train, or continue what the run folder holds, then fine-tune as it says, as one rank of `world`; returns why it ended.

    `startup` is the clock of a process that does nothing else, and is told at its first step.
    """
    began = time.monotonic()
    device = pick_device(config.device, world.local_rank)
    # The claim comes after the process group: by then every rank has checked that the folder is free.
    with process_group(world, device), _claimed(config, world) as held:
        reason = _train(config, world, device, held, startup, began)
        if reason == "complete" and config.finetune:
            reason = _fine_tune(config, world, device, held, began)
    return reason


def _fine_tune(config: RunConfig, world: World, device: torch.device, held: Claim | None, began: float) -> str:
    """The fine-tunings at the end of a run that is complete, each a run of its own; what they come to is told in its records."""
    for name in config.finetune:
        gc.collect()  # the weights of the run before
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if isinstance(config.engine, DeepSpeedConfig):
            forget_groups()
        child = child_of(config, name, lambda _: [])
        if gather_texts(["complete"] if world.main and is_complete(child) else []):
            continue
        with _claimed(child, world) as held_too:
            reason = _train(child, world, device, held_too, None, began)
        if reason != "complete":
            return reason
    values = measured(config) if held is not None else {}
    if values and held is not None:
        log = open_log(
            config, held, config.observe, wandb_id=None, step=config.steps, startup=None, taken_back=[], amends=True
        )
        try:
            tell_results(config, values, log)
        finally:
            log.close("complete", failed=False)
    return "complete"


@contextmanager
def _claimed(config: RunConfig, world: World) -> Iterator[Claim | None]:
    """Hold the folders of a run, on the rank that writes there."""
    apart = config.claimed_apart
    with (
        claim(config.folder) if world.main else nullcontext() as held,
        claim(apart) if world.main and apart is not None else nullcontext(),
    ):
        yield held


def _train(
    config: RunConfig, world: World, device: torch.device, held: Claim | None, startup: Startup | None, began: float
) -> str:
    """One run over the process group that is there, from its engine to the end of its log; returns why it ended."""
    clock = startup or Startup(None)
    with watched(world, minutes=config.hang_limit, folder=config.folder, exit_code=HUNG) as watch:
        clock.done("process group")
        preflight = _preflight(config, world, device) if config.preflight else None
        topology = build_topology(config, world, device)
        if preflight is not None:
            preflight.measure(topology.ep.get_group(), _slots_bytes(config, topology))
            clock.done("preflight")
        engine = build_engine(config, topology, device)
        clock.done("engine")
        index_shards(config, world)
        stream = training_stream(config, world, device)
        evaluators = build_evaluators(config, world, watch.over)
        clock.done("data")
        state = TrainState(engine, step=0, images_seen=0, cursor=Cursor(0), wandb_id="")
        store = _store(config, world)
        watch.begin(state)
        resumed = resume(config, state, store, stream)
        clock.done("checkpoint")
        log = watch.log = log_of(config, held, state, resumed=resumed, startup=startup)
        clock.done("log and W&B")
        log.message(_description(config, engine, topology))
        for told in _left_out(config, world):
            log.message(told)
        tell(evaluators, log)
        saver = _saver(config, state, store, log, main=world.main)
        if world.main:
            tell_progress(saved=False)
        with _stop(config, world, began) as stop:
            watch.begin(state)
            reason = "failed"
            try:
                plan = _plan(config, stream, world)
                while isinstance(ended := fit(state, plan, stream, evaluators, saver, log, stop), BadData):
                    saver.settle(None)
                    log = watch.log = _roll_back(ended, config, held, state, store, stream, log)
                    saver = _saver(config, state, store, log, main=world.main)
                reason = ended
            except BaseException as error:
                watch.wait_for_the_end()
                reason = f"failed: {type(error).__name__}: {error}"
                if isinstance(error, BadStepsError):  # every rank's alike, and what was begun before it is good
                    with suppress(CheckpointError):  # or it would be told in place of the bad steps
                        saver.settle(None)
                raise
            finally:
                log.close(reason, failed=reason.startswith("failed"))
    return reason


def build_topology(config: RunConfig, world: World, device: torch.device) -> Topology:
    """The meshes of the settings, over the default process group; every rank calls it.

    Raises ConfigError on every rank where the hosts do not allow what the settings leave to them.
    """
    # Hosts may have different numbers of ranks, and all must cut the expert axis alike: runs of this many lie on one host.
    hosts = sorted(set(gather_over_world(torch.tensor(world.local_size, device=device)).tolist()))
    local_size = math.gcd(*hosts)
    experts = config.model.num_experts
    problems = layout_problems(config.parallel, num_experts=experts, size=world.size, local_size=local_size)
    if problems:
        where = (
            "" if len(hosts) == 1 else f" (hosts have {' or '.join(map(str, hosts))} ranks, multiples of {local_size})"
        )
        raise ConfigError([problem + where for problem in problems])
    return Topology.build(config.parallel, num_experts=experts, device=device, size=world.size, local_size=local_size)


def build_engine(
    config: RunConfig, topology: Topology, device: torch.device, materialise: Materialise = with_values
) -> TorchEngine | DeepSpeedEngine:
    """The engine that the settings name, its weights as the seed gives them (or as `materialise` does)."""
    model = build_model(config.model, DTYPES[config.precision])
    match config.engine:
        case TorchEngineConfig():
            return build_torch_engine(
                model,
                optim=config.optim,
                average=config.average,
                parallel=config.parallel,
                topology=topology,
                compiled=config.compile,
                loss=config.loss,
                global_batch=config.batch_size,
                seed=config.seed,
                device=device,
                materialise=materialise,
            )
        case DeepSpeedConfig():
            return build_deepspeed_engine(
                model,
                decided=decided(config, config.engine, topology.size),
                average=config.average,
                topology=topology,
                compiled=config.compile,
                loss=config.loss,
                seed=config.seed,
                device=device,
                materialise=materialise,
            )


def index_shards(config: RunConfig, world: World, *, needs_train: bool = True) -> None:
    """Have the ranks of each host share the reading of tars that no run has met before.

    Raises ConfigError on every rank that names every tar which cannot be read to its end.
    """
    part, parts = world.local_rank % world.local_size, world.local_size
    found = make_indexes(
        config.data, part=part, parts=parts, needs_test=config.evals.reads_test(config.model), needs_train=needs_train
    )
    for data in [data for name, data in upstream_sets(config.evals, config.data).items() if name != "test"]:
        found += make_indexes(data, part=part, parts=parts, needs_test=True, needs_train=False)
    problems = gather_texts(found)
    if problems:
        raise ConfigError(problems)


def _left_out(config: RunConfig, world: World) -> list[str]:
    """What is to be told of samples that are not read, by the one rank that tells it."""
    if isinstance(config.data, SyntheticConfig) or not world.main:
        return []
    return left_out(config.data, needs_test=config.evals.reads_test(config.model))


def training_stream(config: RunConfig, world: World, device: torch.device) -> ImageStream:
    """The training stream of this rank; raises ConfigError where no sample is left, or hosts see others. Collective over the world."""
    try:
        stream = build_stream(
            config.data,
            image_size=config.model.image_size,
            num_classes=config.model.num_classes,
            seed=config.seed,
            global_batch=config.batch_size,
            rank=world.rank,
            world=world.size,
            pinned=device.type == "cuda",
        )
    except ValueError as error:  # a filter that leaves nothing, say: it is the same on every rank
        raise ConfigError([str(error)]) from None
    seen = gather_texts([json.dumps(stream.fingerprint(), sort_keys=True)])
    if len(seen) > 1:
        raise ConfigError(
            [
                f"data.train: the ranks do not see the same shards ({' and '.join(seen)}); give every host the same files, or one URL"
            ]
        )
    return stream


def _preflight(config: RunConfig, world: World, device: torch.device) -> Preflight:
    """What every rank says of itself, before anything but the process group is built; raises ConfigError on every rank."""
    about = About(
        folder=config.folder,
        settings=config.as_saved(),
        fsdp=config.parallel.sharding != "replicated",
        workers=0 if isinstance(config.data, SyntheticConfig) else config.data.workers,
        dtype=DTYPES[config.precision],
    )
    return Preflight(world, device, about)


def _slots_bytes(config: RunConfig, topology: Topology) -> int:
    """What a rank hands to one exchange of slots of a micro-batch; 0 without experts."""
    moe = config.model.moe
    groups = config.batch_size // (topology.size * config.micro_batches * config.model.group_images)
    slots = groups * moe.num_experts * config.model.capacity if config.model.has_experts else 0
    return slots * config.model.width * DTYPES[config.precision].itemsize // config.parallel.exchange_chunks


def _store(config: RunConfig, world: World) -> CheckpointStore:
    return CheckpointStore(
        config.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        rank=world.rank,
        world=world.size,
        group=control_group(world),
    )


def _saver(config: RunConfig, state: TrainState, store: CheckpointStore, log: SilentLog, *, main: bool) -> Saver:
    def saved(folder: Place) -> None:
        if main:
            tell_progress(saved=True)
        log.saved(step_of(folder), url_of(folder))

    saver = Saver(
        store,
        max_failures=config.checkpoint.max_failures,
        warn=lambda text: log.alert("checkpoints", text),
        best=state.best,
        saved=saved,
    )
    if config.checkpoint.every and state.step < config.steps:
        store.prepare(state.engine.state_dict())
        saver.look_ahead()
    return saver


def _roll_back(
    data: BadData,
    config: RunConfig,
    held: Claim | None,
    state: TrainState,
    store: CheckpointStore,
    stream: ImageStream,
    log: SilentLog,
) -> SilentLog:
    """Go back to before `data`, which is then passed over; returns the log that goes on from there."""
    given_up_at = state.step
    resumed, gone = go_back(data, config, state, store, stream)
    title = f"rolled back from step {given_up_at} to {state.step}"
    log.close(f"rolled back: from step {given_up_at} to {state.step}", failed=False)
    log = log_of(config, held, state, resumed=resumed, startup=None)
    deleted = f"; {', '.join(path.name for path in gone)} deleted" if gone else ""
    log.alert(
        title,
        f"every step from {data.first_step} to {data.last_step} was bad, so their images, samples {data.begin} to {data.end - 1}, "
        f"are passed over (rollback {len(state.bad_steps.passed_over)} of at most {config.bad_steps.rollbacks}){deleted}",
    )
    return log


def _stop(config: RunConfig, world: World, began: float) -> AbstractContextManager[AgreedStop]:
    return agreed_stop(
        world,
        ends_at=None if config.time_limit is None else began + 60 * config.time_limit,
        grace_seconds=config.checkpoint.grace,
        exit_code=RESUME,
    )


def _description(config: RunConfig, engine: TorchEngine | DeepSpeedEngine, topology: Topology) -> str:
    """What is about to be trained, in a line."""
    parameters = sum(p.numel() for p in engine.parameters.values())
    moe = config.model.moe
    layers = len(moe_blocks(moe.blocks, config.model.depth))
    experts = "no experts"
    if layers:
        group = f" a group of {config.model.group_images} images" if config.model.group_images > 1 else ""
        experts = f"{moe.router}, {moe.num_experts} experts x {config.model.capacity} slots{group} in {layers} blocks"
    layout = f"expert axis {topology.ep.size()}, {config.parallel.sharding}"
    if isinstance(config.engine, DeepSpeedConfig):
        layout = f"expert axis {topology.ep.size()}, DeepSpeed ZeRO {config.engine.zero_stage}"
        if config.engine.zero_stage == 2 and config.micro_batches > 1:
            layout += ", gradients summed at every micro-batch"
    ranks = "1 process" if topology.size == 1 else f"{topology.size} processes, {layout}"
    return f"{parameters:,} parameters, {experts}; {ranks}; {engine.device.type}, {config.precision}"


def _plan(config: RunConfig, stream: ImageStream, world: World) -> Plan:
    return Plan(
        steps=config.steps,
        stop_after=config.stop_after,
        micro_batches=config.micro_batches,
        learning_rate=lambda step: learning_rate(config.schedule, step, config.steps),
        report_every=config.observe.every,
        save_every=config.checkpoint.every,
        best=config.checkpoint.best,
        bad_steps=config.bad_steps,
        bad_batches=BadBatches(config.folder / "bad_batches.jsonl", stream) if world.main else None,
        budget=_budget(config),
        broken_file=config.folder / BROKEN_FILE if world.main else None,
        moves_every=_moves_every(config),
        expert_blocks=moe_blocks(config.model.moe.blocks, config.model.depth),
        documents={"config": config.as_saved(), "stream": stream.fingerprint()},
    )


def _moves_every(config: RunConfig) -> int:
    """How often expert updates are told: where routers are looked at in mid-run."""
    routing = config.evals.routing
    return routing.every if routing is not None and routing.updates and config.model.has_experts else 0


def _budget(config: RunConfig) -> Budget | None:
    if isinstance(config.data, SyntheticConfig):
        return None
    return Budget(count=config.data.max_broken, fraction=config.data.max_broken_fraction)
