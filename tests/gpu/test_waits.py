"""A training step never waits for the device, in either engine, whatever it shards, optimizes, averages or computes again."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from softmoe_train.config import compose
from softmoe_train.data.batch import Batch
from softmoe_train.dist import World
from softmoe_train.faults.stop import AgreedStop
from softmoe_train.parity.state import parity_batch
from softmoe_train.run import build_engine, build_topology
from softmoe_train.settings import RunConfig
from tests.gpu.test_exchange import regroup
from tests.ranks.launch import run_ranks

STEPS = [
    *(f"precision={p} parallel.sharding={s}" for p in ("float32", "bfloat16") for s in ("replicated", "fsdp")),
    *(f"engine=deepspeed engine.zero_stage={stage}" for stage in (0, 1, 2)),
    "engine=deepspeed engine.zero_stage=2 precision=bfloat16 average=ema",
    "optim=adafactor",
    "optim=adafactor parallel.sharding=fsdp",
    "optim=sgd",
    "average=ema",
    "average=ema parallel.sharding=fsdp",
    *(f"parallel.recompute={what}" for what in ("block", "moe")),
    "parallel.recompute=moe parallel.sharding=fsdp parallel.prefetch=1",
    "loss=sigmoid",
]


def all_steps(rank: int, world: int, kind: str, folder: str) -> dict[str, str]:
    """What went wrong with each. `kind` is cuda; cpu runs the same lines over Gloo, to try this file where there is no GPU."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    regroup(rank, world, device, folder)
    torch.set_float32_matmul_precision("highest")  # no TF32
    return {overrides: problem_of(overrides, World(rank, world, rank, world), device) for overrides in STEPS}


def problem_of(overrides: str, world: World, device: torch.device) -> str:
    """Three steps of two micro-batches; on a GPU the last two raise where the host waits for it. Empty where all is well."""
    words = ["recipe=debug", f"device={device.type}", "micro_batches=2", *overrides.split()]
    config = compose(RunConfig, words, lambda _: [])
    engine = build_engine(config, build_topology(config, world, device), device)
    steps = [parity_batch(config, update, range(config.batch_size)).to(device).split(2) for update in range(3)]
    stop = AgreedStop(SimpleNamespace(asked=None), None, dist.new_group(backend="gloo"))  # pyright: ignore

    def step(parts: list[Batch]) -> None:
        for part in parts:
            engine.forward_backward(part, last=part is parts[-1])
        engine.update(1e-3)
        stop.agreed()

    step(steps[0])  # what happens once may wait
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(steps[1])
        step(steps[2])
    except RuntimeError as error:
        return str(error)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


@cache
def problems(kind: str, folder: Path) -> dict[str, str]:
    return run_ranks(all_steps, 1, kind, str(folder))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("overrides", STEPS)
def test_a_step_never_waits_for_the_device(overrides: str, folder: Path) -> None:
    assert problems("cuda", folder)[overrides] == ""


def test_each_of_these_steps_is_made_on_a_cpu(tmp_path: Path) -> None:
    assert {overrides: said for overrides, said in problems("cpu", tmp_path).items() if said} == {}
