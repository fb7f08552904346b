"""A block with experts over two ranks: equal to one process in every precision, and compiled as one graph, to eager."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softmoe_train.dist import local_offsets, local_values
from softmoe_train.model.init import LocalPart, initialize
from softmoe_train.model.vit import Block
from softmoe_train.parallel.exchange import build_exchange
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.topology import Topology
from tests.ranks.launch import run_ranks
from tests.ranks.small import model_config, parallel_config, perturb

CASES: dict[str, dict[str, Any]] = {
    "axis 1": {"expert_axis": 1},
    "axis 2": {"expert_axis": 2},
    "axis 2 in chunks": {"expert_axis": 2, "exchange_chunks": 2},
}
DTYPES = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 1e-2)}
IMAGES = 4  # of each rank


def block_of(world: int, **layout: Any) -> Block:
    with torch.device("meta"):
        block = Block(model_config(), has_experts=True)
    if layout:
        parallel = parallel_config(**layout)
        topology = Topology.build(parallel, num_experts=8, device=torch.device("cpu"), size=world, local_size=world)
        shard_experts(block, topology.ep, build_exchange(parallel, topology))
    block.to_empty(device="cpu")
    initialize(block, 0, lambda p: LocalPart(local_values(p), local_offsets(p)))
    perturb(block)
    return block


def outputs_and_gradients(run: nn.Module, block: Block, rank: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of this rank's images, given as a view that is not contiguous."""
    whole = torch.randn(24, 16, 2 * IMAGES, generator=torch.Generator().manual_seed(2)).to(dtype)
    per = 2 * IMAGES // world
    x = whole[:, :, rank * per : (rank + 1) * per].permute(2, 1, 0).detach().requires_grad_()
    assert not x.is_contiguous()
    block.zero_grad()
    y, _ = run(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    gradients = {n: local_values(p.grad).clone() for n, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def everything_on_a_rank(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, layout in CASES.items():
        block = block_of(world, **layout)
        eager = {d: outputs_and_gradients(block, block, rank, world, kind) for d, (kind, _) in DTYPES.items()}
        torch.compiler.reset()
        compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
        once = outputs_and_gradients(compiled, block, rank, world, torch.float32)
        results[name] = {"eager": eager, "compiled": once}
    return results


@cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything_on_a_rank, 2, timeout=300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_block_on_non_contiguous_inputs_equals_one_process(name: str, dtype: str) -> None:
    block = block_of(1)
    kind, tolerance = DTYPES[dtype]
    want = outputs_and_gradients(block, block, 0, 1, kind)
    got = [r[name]["eager"][dtype] for r in ranks()]
    for key, value in want.items():
        parts = [r[key] for r in got]
        sharded = key in ("y", "x") or (".experts." in key and name != "axis 1")
        error = ((torch.cat(parts) if sharded else sum(parts)) - value).float().norm() / value.float().norm()
        # bf16: a row's product does not change with the number of rows, but the order of a sum over rows may.
        assert error < tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_block_is_one_graph_and_equals_eager(name: str) -> None:
    for r in ranks():
        eager, compiled = r[name]["eager"]["float32"], r[name]["compiled"]
        assert eager.keys() == compiled.keys()
        for key, want in eager.items():
            # The same operations in the same order: to the rounding of float32.
            error = ((compiled[key] - want).norm() / want.norm()).item()
            assert error < 1e-6, f"{key}: {error:.1e}"
