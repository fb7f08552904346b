"""The slot exchange under NCCL: bit for bit what one process computes on the CPU, and the host never waits for it.

Two and more GPUs have not run yet. On one GPU the all-to-all has one rank, which still goes through NCCL and its stream.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from softmoe_train.model.moe import LocalExchange, MoE
from softmoe_train.parallel.collective import Stage
from softmoe_train.parallel.exchange import AllToAllExchange, NarrowExchange, build_exchange
from softmoe_train.parallel.topology import Topology
from tests.models import moe_config
from tests.ranks.launch import run_ranks
from tests.ranks.small import parallel_config
from tests.ranks.test_exchange import EXCHANGES, E, G, there_and_back, weighting, whole_slots

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.gpu
DTYPES = ("float32", "bfloat16")


def everything_on_a_rank(rank: int, world: int, kind: str, folder: str) -> dict[Any, dict[str, Tensor]]:
    """`kind` is cuda; cpu runs the same lines over Gloo, to try this file where there is no GPU."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    regroup(rank, world, device, folder)
    moved = {}
    for name, changes in EXCHANGES.items():
        if changes.get("exchange") == "two_stage" and world != 4:
            continue
        exchange = _exchange(world, device, changes)
        for dtype in DTYPES:
            moved[name, dtype] = _moved(exchange, rank, world, device, getattr(torch, dtype))
        if kind == "cuda":
            _never_waits(exchange, world, device)
    return moved


def regroup(rank: int, world: int, device: torch.device, folder: str) -> None:
    """In place of the Gloo group of `run_ranks`, the one that runs have: NCCL for what is on a GPU."""
    dist.barrier()  # a rank that leaves while another still connects would fail it
    dist.destroy_process_group()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)


def _exchange(world: int, device: torch.device, changes: dict[str, Any]) -> Any:
    parallel = parallel_config(world, **changes)
    topology = Topology.build(parallel, num_experts=E, device=device, size=world, local_size=world)
    if world > 1:
        return build_exchange(parallel, topology)
    alone = AllToAllExchange([Stage(topology.dp.get_group().group_name, 1, dim=0)], parallel.exchange_chunks)
    return alone if parallel.exchange_dtype is None else NarrowExchange(alone, torch.bfloat16)


def _moved(exchange: Any, rank: int, world: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    mine = slice(rank * G, (rank + 1) * G)
    slots = whole_slots(dtype)[mine].to(device).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not slots.is_contiguous()
    scale = torch.arange(1, E + 1, dtype=dtype, device=device)[rank * E // world : (rank + 1) * E // world]
    _, back, grad = there_and_back(exchange, slots, weighting(dtype)[mine].to(device), scale)
    return {"back": back.cpu(), "grad": grad.cpu()}


def _never_waits(exchange: Any, world: int, device: torch.device) -> None:
    """Raises where the host waits for the device inside a layer's forward or backward."""
    config = moe_config(blocks=[0], router="soft", num_experts=E, slots_per_expert=3, expert_init="independent")
    with torch.device("meta"):
        layer = MoE(config, width=24, hidden=40)
        whole = MoE(config.model_copy(update={"num_experts": E // world}), width=24, hidden=40).experts
    layer.experts, layer.exchange = whole, exchange  # this rank's share, as plain weights
    layer.to_empty(device=device)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    x = torch.randn(6, 16, 24, device=device, requires_grad=True)
    layer(x)[0].square().sum().backward()  # the first step builds communicators and picks kernels
    torch.cuda.synchronize(device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x)[0].square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cache
def ranks(world: int, folder: str) -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(everything_on_a_rank, world, "cuda", folder, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_exchange_over_nccl_equals_one_process_bit_for_bit(world: int, folder: Path) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, torch sees {GPUS}")
    store = folder / str(world)
    store.mkdir()
    compare(world, ranks(world, str(store)))


def compare(world: int, got: list[dict[Any, dict[str, Tensor]]]) -> None:
    for name, dtype in got[0]:
        kind = getattr(torch, dtype)
        local = NarrowExchange(LocalExchange(), torch.bfloat16) if "wire" in name else LocalExchange()
        images = slice(world * G)
        scale = torch.arange(1, E + 1, dtype=kind)
        _, back, grad = there_and_back(local, whole_slots(kind)[images], weighting(kind)[images], scale)
        assert torch.equal(torch.cat([r[name, dtype]["back"] for r in got]), back), f"{name}, {dtype}: outputs"
        assert torch.equal(torch.cat([r[name, dtype]["grad"] for r in got]), grad), f"{name}, {dtype}: gradients"
