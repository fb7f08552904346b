"""One GPU: the numbers of the CPU, a router in float32, blocks that compile."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.config import compose
from softmoe_train.data.batch import Batch
from softmoe_train.dist import World, process_group
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.moe import MoE
from softmoe_train.model.routing import SoftRouter
from softmoe_train.parallel.topology import Topology
from softmoe_train.parity.state import parity_batch, perturb_engine
from softmoe_train.run import build_engine
from softmoe_train.settings import RunConfig
from tests.models import moe_config
from tests.runs import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.cuda.set_device(GPU)
    torch.set_float32_matmul_precision("highest")  # no TF32
    with process_group(ALONE, GPU):
        yield


def debug(*overrides: str) -> RunConfig:
    return compose(RunConfig, ["recipe=debug", "device=cuda", *overrides], lambda _: [])


def build(config: RunConfig, device: torch.device) -> Engine:
    experts = config.model.num_experts
    topology = Topology.build(config.parallel, num_experts=experts, device=device, size=1, local_size=1)
    engine = build_engine(config, topology, device)
    perturb_engine(engine, config.seed)
    return engine


def batch(config: RunConfig) -> Batch:
    return parity_batch(config, 0, range(config.batch_size))


def gradients(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    engine = build(config, device)
    engine.forward_backward(batch(config).to(device), last=True)
    return {name: g.detach().cpu() for name, g in engine.gradients().items()}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(((got[name] - want[name]).norm() / want[name].norm()).item() for name in want)


def test_float32_gradients_are_those_of_the_cpu() -> None:
    config = debug()
    assert worst(gradients(config, GPU), gradients(config, CPU)) < 1e-5


def test_bf16_gradients_are_those_of_the_cpu_to_its_rounding() -> None:
    config = debug("precision=bfloat16")
    assert worst(gradients(config, GPU), gradients(config, CPU)) < 5e-2


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_a_layer_with_a_sparse_router_has_the_numbers_of_the_cpu_and_repeats_bit_for_bit(router: str) -> None:
    sparse = {"group_images": 4, "capacity_factor": 0.5}
    layer = MoE(moe_config(router=router, num_experts=8, expert_init="independent", sparse=sparse), 32, 64)
    initialize(layer, 0)
    tokens = torch.randn(16, 49, 32, generator=torch.Generator().manual_seed(0))

    def step(device: torch.device) -> dict[str, Tensor]:
        own, x = copy.deepcopy(layer).to(device), tokens.to(device).requires_grad_()
        y, told = own(x, image_keys(0, torch.arange(16, device=device)))
        inputs = {"x": x, **dict(own.named_parameters())}
        found = torch.autograd.grad(y.square().sum() + told[0], list(inputs.values()))
        return {name: t.detach().cpu() for name, t in {"y": y, "told": told, **dict(zip(inputs, found))}.items()}

    here, once, again = step(CPU), step(GPU), step(GPU)
    # The nearest two gates are 2.6e-6 apart, relative: rounding changes nobody who is served.
    assert worst(once, here) < 1e-5
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_the_router_sees_float32_under_bf16(sharding: str) -> None:
    config = debug("precision=bfloat16", f"parallel.sharding={sharding}")
    engine = build(config, GPU)
    seen: set[tuple[torch.dtype, ...]] = set()

    def look(router: SoftRouter, inputs: tuple[Tensor, ...], out: Any) -> None:
        seen.add((router.phi.dtype, router.scale.dtype, inputs[0].dtype, out.dispatch.dtype, out.combine.dtype))

    for module in engine.module.modules():
        if isinstance(module, SoftRouter):
            module.register_forward_hook(look)
    engine.forward_backward(batch(config).to(GPU), last=True)
    engine.update(1e-3)
    f32, bf16 = torch.float32, torch.bfloat16
    assert seen == {(f32, f32, bf16, f32, f32)}
    assert {t.dtype for name, t in engine.state_dict().items() if name.startswith("model.")} == {f32}


SPARSE = ["model.moe.router=tokens_choice", "model.moe.sparse.group_images=2"]


@pytest.mark.parametrize(
    "how", [[], ["precision=bfloat16"], ["compile=true"], ["compile=true", "precision=bfloat16"], SPARSE]
)
def test_softmoe_parity_holds(tmp_path: Path, how: list[str]) -> None:
    command = [sys.executable, "-m", "softmoe_train", "parity", "recipe=debug", "device=cuda", *how]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
