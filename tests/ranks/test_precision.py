"""bf16: the router stays float32, stored weights and moments stay float32, and layouts agree with each other."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.model.routing import SoftRouter
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, build, share


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(rank: int, world: int, axis: int, sharding: str) -> dict[str, Any]:
    engine = build(rank, world, axis, sharding, dtype=torch.bfloat16, optim=ADAMW)
    seen: set[tuple[torch.dtype, ...]] = set()
    for module in engine.module.modules():
        if isinstance(module, SoftRouter):
            # What the router holds and returns inside a real forward under this layout.
            module.register_forward_hook(
                lambda m, inputs, out: seen.add(
                    (m.phi.dtype, m.scale.dtype, inputs[0].dtype, out.dispatch.dtype, out.combine.dtype)
                )
            )
    batches = share(rank, world, 2)
    losses = [engine.forward_backward(b, last=b is batches[-1]) for b in batches]
    gradients = {name: full(g) for name, g in engine.gradients().items()}
    engine.update(0.001)
    state = engine.state_dict()
    return {
        "loss": torch.stack(losses).sum().item(),
        "gradients": gradients,
        "seen": seen,
        "dtypes": {t.dtype for t in state.values()},
    }


def whole(rank: int, world: int) -> dict[tuple[int, str], dict[str, Any]]:
    layouts = [(axis, sharding) for axis in (1, 2, 4) if axis <= world for sharding in ("replicated", "fsdp")]
    return {layout: one_step(rank, world, *layout) for layout in layouts}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(whole, 1)[0][1, "replicated"]


@pytest.fixture(scope="module")
def four() -> list[dict[tuple[int, str], dict[str, Any]]]:
    return run_ranks(whole, 4)


LAYOUTS = [(axis, sharding) for axis in (1, 2, 4) for sharding in ("replicated", "fsdp")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_router_sees_float32_and_storage_is_float32(four: list, layout: tuple[int, str]) -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    assert four[0][layout]["seen"] == {(f32, f32, bf16, f32, f32)}
    assert four[0][layout]["dtypes"] == {f32}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bf16_layouts_agree_in_every_gradient(one: dict, four: list, layout: tuple[int, str]) -> None:
    ranks = [r[layout] for r in four]
    assert sum(r["loss"] for r in ranks) == pytest.approx(one["loss"], rel=1e-3)
    for name, want in one["gradients"].items():
        got = ranks[0]["gradients"][name]
        assert got.dtype == torch.float32
        # Each rank rounds its part of a sum to bf16 (2^-9 relative) before it is added to the others in float32.
        error = ((got - want).norm() / want.norm()).item()
        assert error < 0.02, f"{name}: {error:.1e}"
