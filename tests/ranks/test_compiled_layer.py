"""The MoE layer under torch.compile: one graph, the numbers of the eager layer. (A process of its own: shape checks break graphs.)"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import MoEConfig
from tests.models import moe_config
from tests.ranks.launch import run_ranks

BASE = {"blocks": [0], "num_experts": 3, "slots_per_expert": 2, "expert_init": "independent"}
CONFIG = moe_config(**BASE)
ABLATIONS: dict[str, dict[str, Any]] = {
    "soft / uniform": {"soft": {"combine": "uniform"}},
    "uniform / soft, not normalised": {"soft": {"dispatch": "uniform", "normalize": False}},
    "uniform": {"soft": {"dispatch": "uniform", "combine": "uniform"}},
    "separate": {"soft": {"combine": "separate"}},
    "identity": {"router": "identity"},
    "gated, dropped": {"expert": "gated_mlp", "expert_dropout": 0.3},
}
# inductor's C++ takes long to build: once, for the dtype with the casts.
CASES = [(torch.float32, "aot_eager"), (torch.bfloat16, "aot_eager"), (torch.bfloat16, "inductor")]


def errors(dtype: torch.dtype, backend: str, config: MoEConfig = CONFIG) -> list[float]:
    """Of the output and of every gradient: |compiled - eager| / |eager|."""
    torch._dynamo.reset()  # each case is one more version of the same code, and there are more than it allows
    layer = MoE(config, width=6, hidden=10)
    initialize(layer, seed=5)
    keys = image_keys(0, torch.arange(2))
    x, g = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()

    def run(module: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        y, _ = module(x, keys)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g)]

    pairs = zip(run(torch.compile(layer, fullgraph=True, backend=backend)), run(layer), strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def every_case(rank: int, world: int) -> dict[Any, list[float]]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    found: dict[Any, list[float]] = {case: errors(*case) for case in CASES if case[1] != "inductor" or compiler}
    ablated = {name: moe_config(**BASE, **changes) for name, changes in ABLATIONS.items()}
    return found | {name: errors(torch.float32, "aot_eager", config) for name, config in ablated.items()}


@pytest.fixture(scope="module")
def found() -> dict[Any, list[float]]:
    return run_ranks(every_case, 1, timeout=300)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_compiles_as_one_graph_to_equal_numbers(found: dict, case: tuple[torch.dtype, str]) -> None:
    if case not in found:
        pytest.skip("inductor needs a C++ compiler")
    dtype, backend = case
    # aot_eager runs the same kernels. inductor adds up in another order, and leaves out roundings to bf16 between two steps.
    assert max(found[case]) <= (0 if backend == "aot_eager" else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablated_layer_compiles_as_one_graph_to_equal_numbers(found: dict, name: str) -> None:
    assert max(found[name]) == 0
