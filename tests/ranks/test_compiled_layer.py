"""The MoE layer under torch.compile: one graph, the numbers of the eager layer. (A process of its own: shape checks break graphs.)"""

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.moe import MoE
from tests.models import moe_config
from tests.ranks.launch import run_ranks

Case = tuple[str, torch.dtype, str]  # layer, dtype, backend
LAYERS: dict[str, dict[str, Any]] = {
    "soft": {},
    "soft / uniform": {"soft": {"combine": "uniform"}},
    "uniform / soft, not normalised": {"soft": {"dispatch": "uniform", "normalize": False}},
    "uniform": {"soft": {"dispatch": "uniform", "combine": "uniform"}},
    "separate": {"soft": {"combine": "separate"}},
    "identity": {"router": "identity"},
    "gated, dropped": {"expert": "gated_mlp", "expert_dropout": 0.3},
    "tokens choice": {
        "router": "tokens_choice",
        "tokens_choice": {"top_k": 2, "gshard_loss": 0.1},
        "sparse": {"group_images": 2},
    },
    "experts choice": {"router": "experts_choice", "sparse": {"group_images": 2}},
}
# inductor's C++ takes long to build: once, for the dtype with the casts.
CASES: list[Case] = [
    *((layer, torch.float32, "aot_eager") for layer in LAYERS if layer != "tokens choice"),
    ("tokens choice", torch.bfloat16, "aot_eager"),
    ("soft", torch.bfloat16, "aot_eager"),
    ("soft", torch.bfloat16, "inductor"),
]
REST: list[Case] = [(layer, torch.float32, "inductor") for layer in ("tokens choice", "experts choice")]


def errors(name: str, dtype: torch.dtype, backend: str) -> list[float]:
    """Of the output, of what the router tells and of every gradient: |compiled - eager| / |eager|."""
    torch._dynamo.reset()  # each case is one more version of the same code, and there are more than it allows
    config = moe_config(**{"num_experts": 3, "slots_per_expert": 2, "expert_init": "independent", **LAYERS[name]})
    layer = MoE(config, width=6, hidden=10)
    initialize(layer, seed=5)
    x, g = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    keys = image_keys(0, torch.arange(2))

    def run(module: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        y, told = module(x, keys)
        auxiliary = 0.0 if told is None else told[0]
        told = [] if told is None else [told.detach()]
        return [y.detach(), *told, *torch.autograd.grad((y * g).sum() + auxiliary, [x, *layer.parameters()])]

    pairs = zip(run(torch.compile(layer, fullgraph=True, backend=backend)), run(layer), strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def every_case(rank: int, world: int, cases: list[Case]) -> dict[Case, list[float]]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    return {case: errors(*case) for case in cases if case[2] != "inductor" or compiler}


@cache
def found(cases: tuple[Case, ...]) -> dict[Case, list[float]]:
    return run_ranks(every_case, 1, list(cases), timeout=300)[0]


def check(case: Case, errors: dict[Case, list[float]]) -> None:
    if case not in errors:
        pytest.skip("inductor needs a C++ compiler")
    _, dtype, backend = case
    # aot_eager runs the same kernels. inductor adds up in another order, and leaves out roundings to bf16 between two steps.
    assert max(errors[case]) <= (0 if backend == "aot_eager" else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_compiles_as_one_graph_to_equal_numbers(case: Case) -> None:
    check(case, found(tuple(CASES)))


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=str)
def test_so_do_the_sparse_routers_under_inductor(case: Case) -> None:
    check(case, found(tuple(REST)))
