"""This file owns what ranks do in the tests of the DeepSpeed engine: one start shows all of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint import CheckpointStore
from softmoe_train.engine.deepspeed_config import Decided, DeepSpeedConfig
from softmoe_train.engine.deepspeed_engine import DeepSpeedEngine, build_deepspeed_engine
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.routing import SoftRouter
from softmoe_train.model.vit import build_model
from softmoe_train.optim.average import AverageConfig
from softmoe_train.optim.build import OptimConfig
from softmoe_train.optim.schedule import ScheduleConfig
from softmoe_train.parallel.topology import Topology
from tests.ranks.small import (
    ADAMW,
    GLOBAL_BATCH,
    LR,
    SEED,
    SGD,
    build,
    model_config,
    parallel_config,
    perturb_tensors,
    share,
)

RATE = 0.01
EMA = AverageConfig(decay=0.75, warmup=False)
SCHEDULE = ScheduleConfig(kind="constant", peak=RATE, warmup_steps=0, cooldown_steps=0, timescale=None, final=0.0)
Layout = tuple[int, int, int, int]  # ranks, expert axis, ZeRO stage, micro-batches


def zero(
    layout: Layout, *, optim: OptimConfig = SGD, dtype: torch.dtype = torch.float32, perturbed: bool = True,
    offload: bool = False, average: AverageConfig | None = None, file: Path | None = None, **more: Any,
) -> DeepSpeedEngine:  # fmt: skip
    """The engine of one rank, in the perturbed state unless asked otherwise."""
    world, axis, stage, micro = layout
    config, parallel = model_config(), parallel_config(axis, "replicated", **more)
    device = torch.device("cpu")
    topology = Topology.build(parallel, num_experts=config.moe.num_experts, device=device, size=world, local_size=world)
    engine = DeepSpeedConfig(kind="deepspeed", zero_stage=stage, offload_optimizer=offload, config=file and str(file))
    decided = Decided(
        engine=engine, optim=optim, schedule=SCHEDULE, parallel=parallel, precision="float32", batch_size=GLOBAL_BATCH,
        micro_batches=micro, size=world,
    )  # fmt: skip
    built = build_deepspeed_engine(
        build_model(config, dtype),
        decided=decided,
        topology=topology,
        average=average,
        compiled=False,
        loss="sigmoid",
        seed=SEED,
        device=device,
    )
    if perturbed:
        perturb_tensors(built.parameters)
        built.load_state_dict(built.state_dict())
    return built


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in tensors.items()}


def accumulate(engine: Engine, rank: int, layout: Layout, step: int = 0) -> Tensor:
    batches = share(rank, layout[0], layout[3], step)
    return torch.stack([engine.forward_backward(b, last=b is batches[-1]) for b in batches]).sum()


def measure(rank: int, layout: Layout) -> dict[str, Any]:
    """One clipped SGD step with all that leads to it, and two of AdamW."""
    engine = zero(layout)
    logits = torch.cat([engine.module(b.images).logits.detach() for b in share(rank, layout[0], layout[3])])
    loss = accumulate(engine, rank, layout)
    gradients = whole(engine.gradients())
    stats = engine.update(LR)
    adamw = zero(layout, optim=ADAMW)
    for step in range(2):
        accumulate(adamw, rank, layout, step)
        adamw.update(RATE)
    return {
        "logits": logits,
        "loss": loss.item(),
        "norm": stats.norm.item(),
        "skipped": stats.skipped.item(),
        "gradients": gradients,
        "weights": whole(engine.parameters),
        "adamw": whole(adamw.state_dict()),
    }


def bf16_step(rank: int, layout: Layout) -> dict[str, Any]:
    engine = zero(layout, dtype=torch.bfloat16, optim=ADAMW)
    seen: set[tuple[torch.dtype, ...]] = set()
    for module in engine.module.modules():
        if isinstance(module, SoftRouter):
            # What the router holds and returns inside a real forward under this engine.
            module.register_forward_hook(
                lambda m, inputs, out: seen.add(
                    (m.phi.dtype, m.scale.dtype, inputs[0].dtype, out.dispatch.dtype, out.combine.dtype)
                )
            )
    loss = accumulate(engine, rank, layout)
    gradients = whole(engine.gradients())
    engine.update(RATE)
    dtypes = {t.dtype for t in engine.state_dict().values()}
    return {"loss": loss.item(), "gradients": gradients, "seen": seen, "dtypes": dtypes}


def skip_one(rank: int, layout: Layout) -> dict[str, Any]:
    """A good update, a poisoned one, a good one; and the good ones alone."""
    engine, clean = (zero(layout, optim=ADAMW) for _ in range(2))
    for e in (engine, clean):
        accumulate(e, rank, layout)
        e.update(RATE)
    before = whole(engine.state_dict())
    (batch,) = share(rank, layout[0])
    images = batch.images.float() / 127.5 - 1
    if rank == 1:
        images[0, 0, 0, 0] = torch.inf
    engine.forward_backward(replace(batch, images=images), last=True)
    skipped = engine.update(RATE).skipped.item()
    after = whole(engine.state_dict())
    for e in (engine, clean):
        accumulate(e, rank, layout, step=1)
        e.update(RATE)
    return {
        "skipped": skipped,
        "kept": same(before, after),
        "goes_on": same(whole(engine.state_dict()), whole(clean.state_dict())),
        "moved": not same(after, whole(clean.state_dict())),
    }


def huge_one(rank: int, layout: Layout) -> dict[bool, tuple[float, float, bool]]:
    """One update from gradients that are huge but finite: their squares are beyond float32, and so would be a norm from them."""
    seen = {}
    for offload in (False, True):
        engine = zero(layout, offload=offload)
        engine.local["head.weight"].mul_(1e23)
        engine.load_state_dict(engine.state_dict())
        before = whole(engine.parameters)
        accumulate(engine, rank, layout)
        stats = engine.update(LR)
        seen[offload] = (stats.norm.item(), stats.skipped.item(), not same(before, whole(engine.parameters)))
    return seen


def average_one(rank: int, layout: Layout) -> dict[str, bool]:
    """One update with averaging: the average, what stands in for the weights inside `averaged`, and what is left after."""
    engine, plain = zero(layout, average=EMA), zero(layout)
    # The perturbation came after the average began.
    engine.load_state_dict({name: t for name, t in engine.state_dict().items() if not name.startswith("average.")})
    before = whole(engine.parameters)
    for e in (engine, plain):
        accumulate(e, rank, layout)
        e.update(RATE)
    after = whole(engine.parameters)
    state = whole(engine.state_dict())
    want = {name: before[name].lerp(after[name], 0.25) for name in before}
    with engine.averaged():
        inside = whole(engine.parameters)
        features = engine.module(share(rank, layout[0])[0].images).logits
    for e in (engine, plain):
        accumulate(e, rank, layout, step=1)
        e.update(RATE)
    return {
        "averages": all(torch.allclose(inside[name], want[name], rtol=1e-6, atol=1e-7) for name in want),
        "saves": all(torch.equal(state[f"average.{name}"], inside[name]) for name in want),
        "differs": not same(inside, after) and bool(features.isfinite().all()),
        "leaves training alone": same(whole(engine.parameters), whole(plain.parameters)),
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def store_at(folder: str, rank: int, world: int) -> CheckpointStore:
    return CheckpointStore(Path(folder), keep_last=9, rank=rank, world=world, group=dist.group.WORLD)


def restored(engine: Engine, folder: str, step: int, rank: int, world: int) -> dict[str, Tensor]:
    """Load a step as a run does; what the engine then says that it holds."""
    tensors = engine.state_dict()
    store_at(folder, rank, world).load(Path(folder) / f"step_{step:08d}", tensors)
    engine.load_state_dict(tensors)
    return whole(engine.state_dict())


def on_two(rank: int, world: int, layouts: list[Layout], folder: str) -> dict[str, Any]:
    """All that two ranks show in one start; leaves the native engine's checkpoint after one update as step 1."""
    native = build(rank, world, 2, "fsdp", optim=ADAMW, average=EMA)
    accumulate(native, rank, (world, 2, 0, 1))
    native.update(RATE)
    store_at(folder, rank, world).save(1, native.state_dict(), {})
    saved = whole(native.state_dict())
    accumulate(native, rank, (world, 2, 0, 1), step=1)
    native.update(RATE)
    return {
        "measured": {layout: measure(rank, layout) for layout in layouts},
        "saved": saved,
        "next": whole(native.state_dict()),
        "bf16": {layout: bf16_step(rank, layout) for layout in PAIRS},
        "skip": {layout: skip_one(rank, layout) for layout in PAIRS},
        "huge": {layout: huge_one(rank, layout) for layout in PAIRS[1:]},
        "average": {layout: average_one(rank, layout) for layout in PAIRS[::2]},
        "variants": {name: variant(rank, layout, folder, **more) for name, (layout, more) in VARIANTS.items()},
    }


def variant(rank: int, layout: Layout, folder: str, *, tuned: bool = False, **more: Any) -> dict[str, Any]:
    file = Path(folder) / f"ds_{rank}.json" if tuned else None
    if file is not None:
        file.write_text(json.dumps({"zero_optimization": SMALL_BUCKETS}))
    engine = zero(layout, file=file, **more)
    accumulate(engine, rank, layout)
    gradients = whole(engine.gradients())
    stats = engine.update(LR)
    return {"gradients": gradients, "norm": stats.norm.item(), "weights": whole(engine.parameters)}


def on_four(rank: int, world: int, layouts: list[Layout], folder: str) -> dict[str, Any]:
    """What four ranks measure, and what becomes of step 1 of the native engine at each stage and another axis."""
    return {
        "measured": {layout: measure(rank, layout) for layout in layouts},
        "moved": {layout: moved(rank, layout, folder) for layout in FOURS},
    }


def moved(rank: int, layout: Layout, folder: str) -> dict[str, dict[str, Tensor]]:
    """Step 1 loaded, saved again as step 10 + stage, updated; that save continued; that save under the native engine."""
    world, _, stage, _ = layout
    engine = zero(layout, optim=ADAMW, average=EMA, perturbed=False)
    loaded = restored(engine, folder, 1, rank, world)
    store_at(folder, rank, world).save(10 + stage, engine.state_dict(), {})
    accumulate(engine, rank, layout, step=1)
    engine.update(RATE)
    again = zero(layout, optim=ADAMW, average=EMA, perturbed=False)
    restored(again, folder, 10 + stage, rank, world)
    accumulate(again, rank, layout, step=1)
    again.update(RATE)
    axis, sharding = ((2, "replicated"), (1, "fsdp"), (4, "fsdp"))[stage]
    native = build(rank, world, axis, sharding, optim=ADAMW, average=EMA, perturbed=False)
    back = restored(native, folder, 10 + stage, rank, world)
    return {"loaded": loaded, "next": whole(engine.state_dict()), "again": whole(again.state_dict()), "back": back}


def on_one(rank: int, world: int, layouts: list[Layout]) -> dict[str, Any]:
    return {"measured": {layout: measure(rank, layout) for layout in layouts}}


PAIRS: list[Layout] = [(2, 2, 0, 1), (2, 1, 1, 2), (2, 2, 2, 2)]
SMALL_BUCKETS = {"reduce_bucket_size": 500, "round_robin_gradients": True, "overlap_comm": True}
VARIANTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "the optimizer on the host, ZeRO 1": ((2, 1, 1, 1), {"offload": True}),
    "the optimizer on the host, ZeRO 2": ((2, 2, 2, 2), {"offload": True}),
    "gradients larger than a bucket, ZeRO 1": ((2, 2, 1, 2), {"tuned": True}),
    "gradients larger than a bucket, ZeRO 2": ((2, 2, 2, 2), {"tuned": True}),
    "blocks recomputed, ZeRO 2": ((2, 2, 2, 2), {"recompute": "block"}),
    "layers recomputed, ZeRO 1": ((2, 2, 1, 1), {"recompute": "moe"}),
}
FOURS: list[Layout] = [(4, 1, 0, 1), (4, 4, 1, 1), (4, 2, 2, 1)]
